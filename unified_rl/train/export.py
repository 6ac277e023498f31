"""Trained weights out of the engine, and whole checkpoints out of a run.

`python -m unified_rl.train.export --run RUN --out FOLDER` writes base and policy merged, in Hugging Face layout. Of
Ask-Solve-Generate's roles that is the Solver and the Generator, where they do not change the same weights.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from peft.tuners.lora import LoraLayer
from torch import nn

from unified_rl.backbones.load import Backbone, load_backbone
from unified_rl.backbones.policy_files import ROLES
from unified_rl.config import ConfigError, load_run_config
from unified_rl.files import sha256_file
from unified_rl.ledger import Run
from unified_rl.runtime import EXIT_OK, log, run_stage, set_stage
from unified_rl.train.drawing import whole_tensors


def export_policy(backbone: Backbone, folder: Path, scope: str, names: Sequence[str], writes: bool) -> str:
    """Write the trained tensors of a (partitioned) backbone; all ranks call it, the one with `writes` writes.

    Returns:
        SHA-256 of the weights file, empty on the other ranks.
    """
    tensors = whole_tensors(backbone.model, names, keep=writes)
    if not writes:
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    return sha256_file(backbone.save_policy(folder, scope, tensors))


def merge_lora(model: nn.Module) -> None:
    """Add the adapters to the weights that they adapt, and take them out of the model.

    Raises:
        ConfigError: adapters of two roles for the same weights.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            adapters = list(module.lora_A)
            if len(adapters) > 1:
                raise ConfigError(
                    f"{' and '.join(adapters)} change the same weights of this model, so that no one checkpoint is "
                    "both; give --role to merge one of them"
                )
            module.merge(safe_merge=True, adapter_names=adapters)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())


def load_roles(backbone: Backbone, policy: Path, role: str | None) -> None:
    """Load one role's adapter, or those of Solver and Generator.

    Raises:
        ConfigError: none of them was trained.
    """
    wanted = [role] if role else ["solver", "generator"]
    found = [name for name in wanted if (policy / name).is_dir()]
    if not found:
        raise ConfigError(f"{policy} has no adapter of {' or '.join(wanted)}: not trained yet, so it is the base model")
    for name in found:
        backbone.load_policy(policy / name, name)


def export_checkpoint(run: Run, out: Path, iteration: int, role: str | None = None) -> None:
    """Write the checkpoint that `iteration` ended with as a folder that `from_pretrained` loads.

    Raises:
        ConfigError: `out` exists, or see `load_roles` and `merge_lora`.
        LedgerError: the iteration is not trained.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; give --out a new folder")
    by_role = run.config.reward.method == "self_consistency"
    if role and not by_role:
        raise ConfigError(f"--role {role}: reward.method={run.config.reward.method} trains no roles; leave it out")
    policy, version = run.current_policy(iteration + 1)
    backbone = load_backbone(replace(run.config.backbone, device="cpu"), policy=None if by_role else policy)
    if by_role:
        load_roles(backbone, policy, role)
    merge_lora(backbone.model)
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    backbone.save_checkpoint(unfinished)
    os.replace(unfinished, out)
    log(f"policy {version} written to {out}")


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    set_stage("export")
    parser = argparse.ArgumentParser(prog="python -m unified_rl.train.export", description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=Path, help="run folder")
    parser.add_argument("--out", required=True, type=Path, help="new folder for the checkpoint")
    parser.add_argument("--iteration", type=int, metavar="K", help="weights after iteration K; default: the last one")
    parser.add_argument(
        "--role",
        choices=ROLES,
        help="of Ask-Solve-Generate: merge this role's adapter alone. Default: Solver and Generator together, which "
        "works where they adapt different weights (BAGEL); with Janus they adapt the same ones, so name one",
    )
    arguments = parser.parse_args(argv)
    run = Run(arguments.run, load_run_config(arguments.run))
    iteration = arguments.iteration
    if iteration is None:
        trained = [k for k in range(run.config.iterations) if run.manifest(k, "train") is not None]
        if not trained:
            raise ConfigError(f"{arguments.run} has no trained iteration yet")
        iteration = trained[-1]
    export_checkpoint(run, arguments.out, iteration, arguments.role)
    return EXIT_OK


if __name__ == "__main__":
    run_stage(main)
