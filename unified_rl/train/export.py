"""Trained weights out of the engine, and whole checkpoints out of a run.

`python -m unified_rl.train.export --run RUN --out FOLDER` writes base and policy merged, in Hugging Face layout.
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
    tensors = whole_tensors(backbone.model, names)
    if not writes:
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    return sha256_file(backbone.save_policy(folder, scope, tensors))


def merge_lora(model: nn.Module) -> None:
    """Add the adapters to the weights that they adapt, and take them out of the model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())


def export_checkpoint(run: Run, out: Path, iteration: int) -> None:
    """Write the checkpoint that `iteration` ended with as a folder that `from_pretrained` loads.

    Raises:
        ConfigError: `out` exists.
        LedgerError: the iteration is not trained.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; give --out a new folder")
    policy, version = run.current_policy(iteration + 1)
    backbone = load_backbone(replace(run.config.backbone, device="cpu"), policy=policy)
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
    arguments = parser.parse_args(argv)
    run = Run(arguments.run, load_run_config(arguments.run))
    iteration = arguments.iteration
    if iteration is None:
        trained = [k for k in range(run.config.iterations) if run.manifest(k, "train") is not None]
        if not trained:
            raise ConfigError(f"{arguments.run} has no trained iteration yet")
        iteration = trained[-1]
    export_checkpoint(run, arguments.out, iteration)
    return EXIT_OK


if __name__ == "__main__":
    run_stage(main)
