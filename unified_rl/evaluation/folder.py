"""The folder `RUN/evaluation/iter_000K`: marks of finished units of work, `scores.json`, and the manifest.

Shards are as in rollout. Beside each lies `shard-00000.done.json` with its manifest entry and the outcomes of its
prompts; `answers-NAME.done.json` holds the outcomes of one set of questions. `manifest.json` is written last.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from unified_rl.evaluation.scoring import EvaluationError
from unified_rl.files import sha256_file
from unified_rl.manifests import (
    MANIFEST_NAME,
    ShardInfo,
    encode_json,
    read_json,
    read_manifest,
    shard_info,
    store,
)

SCORES = "scores.json"


def evaluation_folder(run: Path, iteration: int) -> Path:
    """Where the evaluation of the weights after `iteration` iterations lies (0: base weights)."""
    return Path(run) / "evaluation" / f"iter_{iteration:04d}"


def prompts_sha256(prompts: Path) -> str:
    """SHA-256 of a prompt folder's manifest, which holds the checksums of its shards."""
    return sha256_file(Path(prompts) / MANIFEST_NAME)


@dataclass(frozen=True)
class Marks:
    """Reader and writer of the marks of one evaluation.

    `context` (weights, prompts, configuration) is stored in every mark; a mark made in another context is void.
    """

    folder: Path
    context: dict[str, str]

    def write(self, name: str, content: dict) -> None:
        """Mark a unit of work as finished, atomically."""
        store(self._path(name), encode_json({"context": self.context, **content}))

    def write_shard(self, index: int, info: ShardInfo, outcomes: dict) -> None:
        """Mark shard `index`; its tar must be in place."""
        self.write(shard_stem(index), {"shard": asdict(info), "outcomes": outcomes})

    def read(self, name: str) -> dict | None:
        """Content of a valid mark, else None."""
        content = read_json(self._path(name))
        return content if content is not None and content.get("context") == self.context else None

    def read_shard(self, index: int) -> tuple[ShardInfo, dict] | None:
        """Manifest entry and outcomes of a shard whose tar has the size and checksum of its mark, else None."""
        content = self.read(shard_stem(index))
        if content is None:
            return None
        info = shard_info(content["shard"], self._path(shard_stem(index)))
        path = self.folder / info.name
        whole = path.is_file() and path.stat().st_size == info.bytes and sha256_file(path) == info.sha256
        return (info, content["outcomes"]) if whole else None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name.replace('/', '-')}.done.json"


def shard_stem(index: int) -> str:
    """File name of a shard without its extension."""
    return f"shard-{index:05d}"


def read_scores(run: Path, iteration: int) -> dict | None:
    """Content of a committed evaluation's scores.json, else None."""
    folder = evaluation_folder(run, iteration)
    return read_json(folder / SCORES) if read_manifest(folder) is not None else None


def require_scores(run: Path, iteration: int) -> dict:
    """As `read_scores`.

    Raises:
        EvaluationError: the evaluation is not committed; the message holds the command that makes it.
    """
    scores = read_scores(run, iteration)
    if scores is None:
        raise EvaluationError(
            f"{evaluation_folder(run, iteration)} is not committed: run "
            f"`python -m unified_rl.evaluation --run {run} --iteration {iteration}`"
        )
    return scores


def evaluated_iterations(run: Path) -> list[int]:
    """Numbers of the committed evaluations, ascending."""
    folders = (Path(run) / "evaluation").glob("iter_[0-9][0-9][0-9][0-9]")
    numbers = sorted(int(folder.name.removeprefix("iter_")) for folder in folders)
    return [k for k in numbers if read_manifest(evaluation_folder(run, k)) is not None]
