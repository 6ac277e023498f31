"""Run folders with real rollouts and rewards of a random tiny Janus, and real ranks to train them."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from unified_rl.config import load_run_config, open_run
from unified_rl.ledger import Run
from unified_rl.manifests import Manifest, write_manifest
from unified_rl.records import PromptRecord
from unified_rl.reward.stage import reward
from unified_rl.rollout.stage import rollout
from unified_rl.runtime import Ranks
from unified_rl.shards import write_records

ROOT = Path(__file__).parents[2]
PROMPTS = [
    "a red circle", "two rings", "a blue square left of a green cross", "a photo", "a yellow ring",
    "three magenta diamonds and a red triangle",
]  # fmt: skip
GROUP_SIZE = 4


def open_scored_run(folder: Path, checkpoint: Path, *overrides: str, recipe: str = "gvu_janus_shapes") -> Run:
    """A run whose iteration 0 is drawn and scored: 6 groups of 4, two optimiser steps of 12 images in batches of 5."""
    prompts = folder.parent / f"{folder.name}-prompts"
    prompts.mkdir()
    records = [PromptRecord(f"p{i}", text) for i, text in enumerate(PROMPTS)]
    info = write_records(prompts / "prompts-00000.tar", records)
    write_manifest(prompts, Manifest("prompts", 0, [info], "base", "", {"prompts": len(records)}))
    config = open_run(
        folder, recipe, [
            "iterations=2", f"backbone.path={checkpoint}", "backbone.device=cpu", f"data.prompts={prompts}",
            f"data.prompts_per_iteration={len(PROMPTS)}", f"rollout.group_size={GROUP_SIZE}",
            "rollout.groups_per_shard=4", "train.scope=full", "train.groups_per_step=3", "train.micro_batch=5",
            "train.learning_rate=1e-3", "train.warmup_steps=3", "train.max_grad_norm=1.0", "policy.kl_coefficient=0.05",
            *overrides,
        ],
    )  # fmt: skip
    run = Run(folder, config)
    draw_and_score(run, 0)
    return run


def draw_and_score(run: Run, iteration: int) -> None:
    rollout(run, iteration, Ranks(0, 0, 1))
    reward(run, iteration, Ranks(0, 0, 1))


def copy_run(run: Run, folder: Path) -> Run:
    shutil.copytree(run.path, folder)
    return Run(folder, load_run_config(folder))


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def environment() -> dict[str, str]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {k: v for k, v in os.environ.items() if k not in names and not k.startswith("SLURM_")}
    return {**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def run_ranks(ranks: int, script: str, out: Path, *arguments: str) -> list:
    """Run `script OUT ARGUMENTS...` of this folder on `ranks` processes; what each wrote to OUT.RANK.json.

    A rank that waits for ever ends with the time limit, as a failure.
    """
    shared = {**environment(), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, str(Path(__file__).parent / script), str(out), *arguments]
    processes = [
        subprocess.Popen(
            command, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for r in range(ranks)
    ]
    try:
        errors = [process.communicate(timeout=600)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)[-4000:]
    return [json.loads(Path(f"{out}.{r}.json").read_text()) for r in range(ranks)]


def train_with(ranks: int, out: Path, *scenarios: str) -> list:
    """Play scenarios (see driver.py) on `ranks` processes; results of rank 0, the same on all ranks."""
    results = run_ranks(ranks, "driver.py", out, *scenarios)
    assert all(result == results[0] for result in results), results
    return results[0]


@pytest.fixture(scope="session")
def scored_run(tmp_path_factory: pytest.TempPathFactory, random_janus_folder: Path) -> Run:
    """Drawn and scored, not trained; copy it before training."""
    return open_scored_run(tmp_path_factory.mktemp("scored") / "run", random_janus_folder)
