"""Every benchmark, tiny: both sides agree, and its rows have the summary's form. No times are asserted."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as every
from benchmarks import rollout_flow, rollout_tokens, training_step
from benchmarks.measuring import Row, compare, report
from benchmarks.models import bagel, janus
from unified_rl.backbones.base import Sampling

ROOT = Path(__file__).parents[2]
FIELDS = {"table", "case", "ratio", "target", "ours", "theirs", "limit_fraction"}
TINY = {
    "rollout_tokens": ("--width 256 --layers 1 --side 2 --group 2", 2),
    "rollout_flow": ("--width 256 --layers 1 --side 2 --prompts 1 --group 2 --steps 3", 2),
    "reward": ("--width 256 --layers 1 --side 2 --vocabulary 2000 --images 2", 4),
    "questions": ("--width 256 --layers 1 --questions 2 --tokens 2", 4),
    "following": ("--prompts 2 --per-shard 1", 1),
    "growth": ("--images 1 2 --prompts 100 200 --ranks 1 2 --records 250 500", 9),
}

# Those that start processes, or leave DeepSpeed's marks on theirs.
OF_PROCESSES = {
    "training_step": (
        "--width 256 --layers 1 --side 2 --vocabulary 2000 --groups 1 --group 2 --answers 2 --micro-batch 2",
        4,
    ),
    "iteration": ("--prompts 2", 5),
    "rollout_engine": ("--width 256 --layers 1 --side 2 --group 2", 2),
}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", TINY)
def test_benchmark(name, tmp_path, capsys):
    options, rows = TINY[name]
    out = tmp_path / "deep" / "summary.json"
    # An exception or SystemExit is how a benchmark says that its sides differ.
    importlib.import_module(f"benchmarks.{name}").main([*options.split(), "--repeats", "1", "--out", str(out)])
    check(json.loads(out.read_text()), rows, capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_PROCESSES)
def test_benchmark_of_processes(name, tmp_path):
    options, rows = OF_PROCESSES[name]
    out = tmp_path / "summary.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", *options.split(), "--repeats", "1", "--out", out]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    check(json.loads(out.read_text()), rows, done.stdout)


def check(summary: list[dict], rows: int, printed: str) -> None:
    assert len(summary) == rows
    for entry in summary:
        assert set(entry) == FIELDS
        assert entry["ratio"] > 0
        assert entry["case"] in printed
        assert entry["limit_fraction"] is None or entry["limit_fraction"] > 0


def test_tokens_of_other_weights_are_noticed():
    backbone = janus(256, 1, 2)
    drawn = rollout_tokens.ours(backbone, 2, 5.0)
    assert rollout_tokens.difference(backbone, drawn, 5.0) < 1e-4
    with torch.no_grad():
        backbone.model.model.generation_head.vision_head.weight.mul_(2)
    assert rollout_tokens.difference(backbone, drawn, 5.0) > 1e-2


def test_a_peak_is_above_what_was_held():
    before = training_step.held(most=False)
    torch.ones(1 << 26).sum()
    assert training_step.held(most=True) - before > 200e6


def test_guidance_1_on_their_side_is_the_branch_with_the_prompt():
    backbone = janus(256, 1, 9)  # more tokens than a block of the cache
    drawn = backbone.rollout_images([rollout_tokens.PROMPT], [0, 1], Sampling())
    assert rollout_tokens.difference(backbone, drawn, 1.0) < 1e-4


def test_one_image_at_a_time_has_the_seeds_of_the_batch():
    backbone, sampling = bagel(256, 1), rollout_flow.FlowSampling(steps=3, eta=0.7)
    prompts = list(rollout_flow.PROMPTS[:2])
    batch = rollout_flow.ours(backbone, prompts, 2, sampling)
    assert torch.allclose(batch, rollout_flow.theirs(backbone, prompts, 2, sampling), atol=1e-4)


def test_sides_take_turns_after_a_warm_up():
    calls = []
    results = compare(lambda: calls.append("a") or 1, lambda: calls.append("b") or 2, 2)[2:]
    assert (results, calls) == ((1, 2), ["a", "b", "a", "b", "a", "b"])


def test_a_row_replaces_the_earlier_one_of_its_case(tmp_path):
    out = tmp_path / "summary.json"
    report([Row("t", "a", 1.0, 2.0, 1.0, 1.0), Row("t", "b", 1.0, None, 1.0, 1.0)], out)
    report([Row("t", "a", 3.0, 2.0, 1.0, 3.0)], out)
    assert [(entry["case"], entry["ratio"]) for entry in json.loads(out.read_text())] == [("b", 1.0), ("a", 3.0)]


@pytest.mark.parametrize(
    ("case", "ratio", "met"),
    [("x", 1.4, False), ("x", 1.5, True), ("x, at most", 1.4, True), ("x, at most", 1.6, False)],
)
def test_target(case, ratio, met):
    assert Row("t", case, ratio, 1.5, 1.0, 1.0).met is met


def test_all_scripts_are_run_by_make_bench():
    assert {line.split()[0] for line in every.CPU} | {"following"} == TINY.keys() | OF_PROCESSES.keys()
