"""What a run writes, whether the disk can hold it, and which old shards go. Starts without torch."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from unified_rl.config import RunConfig, checkpoint_path, loop_of
from unified_rl.config_checks import TOKEN_FAMILIES
from unified_rl.ledger import Run
from unified_rl.manifests import REMOVED, read_manifest, write_manifest
from unified_rl.runtime import StageError

RECORD = 6 << 10  # bytes of a sample beside its image and tensors: JSON, headers and padding of the tar
OPTIMIZER = 12  # bytes a trained number: fp32 weight and Adam's two moments
TOKEN = 12  # bytes of a written token: id, log-prob or entropy, text
SPARE = 1.05
MAX_HEADER = 100 << 20
STAGES = ("rollout", "reward")


class DiskError(StageError):
    """Too little room, or files of a checkpoint that cannot be read; the message says which and what to do."""


# ---- checkpoint files ---------------------------------------------------------------------------------------------


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a checkpoint folder by name, from the headers of its safetensors files.

    Raises:
        DiskError: no weights, a shard that its index lists is missing, or a file that is cut or damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            listed = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise DiskError(f"{index} is not an index of safetensors shards; download it again") from None
        absent = sorted(listed - {file.name for file in files})
        # A folder may hold the weights in one file as well, and the index of the shards that it was made from.
        if absent and not index.with_name(index.name.removesuffix(".index.json")).is_file():
            raise DiskError(f"{folder} lacks {', '.join(absent[:5])}, which {index.name} lists; download them")
    if not files:
        raise DiskError(f"{folder} has no *.safetensors; download the whole checkpoint")
    return {name: shape for file in files for name, shape in _header(file).items()}


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with open(file, "rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size)) if size <= MAX_HEADER else None
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        shapes = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
        end = 8 + size + max(entry["data_offsets"][1] for entry in tensors.values())
        found = file.stat().st_size
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DiskError(f"{file} is no safetensors file: {error or 'damaged header'}; download it again") from None
    if found != end:
        raise DiskError(f"{file} has {found} bytes, its header promises {end}; download it again")
    return shapes


def trained_numbers(config: RunConfig) -> int:
    """How many numbers training updates, in all roles. Loads the family's rules, and torch with them."""
    from unified_rl.backbones.load import FAMILIES

    family, lora = FAMILIES[config.backbone.family], config.train.lora
    shapes = weight_shapes(checkpoint_path(config.backbone.path))
    if config.train.scope == "full":
        return sum(math.prod(shape) for name, shape in shapes.items() if family.trained_in_full(name))
    reading = 2 if config.reward.method == "self_consistency" else 0  # Proposer and Solver
    adapted = [family.lora_targets, *[family.reading_lora_targets] * reading]
    return sum(
        lora.rank * sum(shape)
        for targets in adapted
        for name, shape in shapes.items()
        if re.fullmatch(targets + r"\.weight", name)
    )


# ---- what an iteration writes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """Bytes that one iteration writes."""

    rollout: int
    reward: int
    policy: int
    checkpoint: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(astuple(self))

    def __str__(self) -> str:
        return ", ".join(f"{name} {gib(size)}" for name, size in vars(self).items())


def image_numbers(config: RunConfig) -> tuple[int, int]:
    """Of a drawn image: pixels, and tokens or latent numbers."""
    folder = checkpoint_path(config.backbone.path)
    values = json.loads((folder / "config.json").read_text())
    if config.backbone.family in TOKEN_FAMILIES:
        vision = values.get("vision_config", {})
        side, patch = vision.get("image_size", 384), vision.get("patch_size", 16)
        return side * side, (side // patch) ** 2
    file = folder / "unified_rl.json"
    height, width = (json.loads(file.read_text()) if file.is_file() else {}).get("drawn", (1024, 1024))
    vae = values.get("vae_config", {})
    return height * width, height * width // vae.get("downsample", 8) ** 2 * vae.get("z_channels", 16)


def expected(config: RunConfig, iteration: int = 0) -> Written:
    """Upper bound before anything is written: images are taken as not compressible."""
    pixels, numbers = image_numbers(config)
    flow, roles, trained = config.rollout.flow, config.self_consistency, trained_numbers(config)
    drawn = reference = 8 * numbers  # tokens and their log-probs
    if config.backbone.family not in TOKEN_FAMILIES:
        decisions = (flow.sde_window or (flow.sde_before or flow.steps - 1)) if flow.eta else 0
        drawn, reference = 4 * numbers * (1 + (decisions + 1 if decisions else 0)), 4 * numbers * decisions
    images, scored = config.data.prompts_per_iteration * config.rollout.group_size, RECORD
    if loop_of(config, iteration) == "understanding":
        images, reference = config.data.prompts_per_iteration, roles.questions * RECORD
        drawn = roles.questions * TOKEN * (roles.proposer_tokens + (roles.answers + 1) * roles.solver_tokens)
    elif config.reward.method == "srum":
        scored += (64 << 10) + 4 * numbers  # regions with reasons, and the map
    return Written(
        rollout=images * (3 * pixels + drawn + RECORD + TOKEN * config.rollout.plan_tokens * config.rollout.think),
        reward=images * (scored + (reference if config.policy.objective == "grpo" else 0)),
        policy=trained * (4 if config.backbone.dtype == "float32" else 2) + RECORD,
        checkpoint=trained * OPTIMIZER + (1 << 20),
    )


def expected_next(run: Run, iteration: int) -> Written:
    """What `iteration` will write: images and scores as many bytes as those of the last such iteration, if any."""
    written, config = expected(run.config, iteration), run.config
    alike = [k for k in range(iteration - 1, -1, -1) if loop_of(config, k) == loop_of(config, iteration)]
    for stage in STAGES:
        manifest = read_manifest(run.iteration_folder(alike[0]) / stage) if alike else None
        if manifest is not None:
            written = replace(written, **{stage: int(SPARE * sum(shard.bytes for shard in manifest.shards))})
    return written


def free_bytes(path: Path) -> int:
    """Room for this user on the disk of `path`, or of the nearest folder above it that exists."""
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free


def require_room(run: Run, iteration: int) -> None:
    """Refuse an iteration that the disk cannot hold; what is written of it already counts as room.

    Raises:
        DiskError: with the numbers.
    """
    written = expected_next(run, iteration)
    there = sum(file.stat().st_size for file in run.iteration_folder(iteration).rglob("*.tar"))
    needed, free = int(SPARE * written.total) - there, free_bytes(run.path)
    if free < needed:
        raise DiskError(
            f"iteration {iteration} of {run.path} needs {gib(needed)} more ({written}), the disk has "
            f"{gib(free)}. Make room, keep fewer checkpoints (train.keep_checkpoints) or shards (data.keep_rollouts) "
            "in a new run, then run the same command again"
        )


def gib(size: float) -> str:
    """Bytes in GiB, or MiB below one."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


# ---- old shards ---------------------------------------------------------------------------------------------------


def drop_old_shards(run: Run, iteration: int) -> None:
    """After the training of `iteration`: keep the shards of the last `data.keep_rollouts` iterations (0: all).

    Manifests stay and say so first, so that a crash in between leaves nothing that promises a missing file.
    """
    keep = run.config.data.keep_rollouts
    for old in range(iteration - keep, -1, -1) if keep else ():
        if not sum(_drop(run, old, stage) for stage in STAGES):  # those before were dropped earlier
            break


def _drop(run: Run, iteration: int, stage: str) -> int:
    folder, manifest = run.iteration_folder(iteration) / stage, run.manifest(iteration, stage)
    files = [*folder.glob("shard-*.tar"), *folder.glob("shard-*.done.json")]
    if manifest is None or not files:
        return 0
    write_manifest(folder, replace(manifest, extra={**manifest.extra, REMOVED: True}))
    for file in files:
        file.unlink(missing_ok=True)
    return len(files)
