"""BAGEL under ZeRO-3 on two ranks, by both updates: what reads stays as it is, and nothing of it is stored."""

import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.made_bagel import build_random_bagel
from tests.train.conftest import copy_run, draw_and_score, open_scored_run, train_with
from tests.train.test_training import distance, metrics_of, policy_bytes, weights_of
from unified_rl.backbones.bagel.backbone import BagelBackbone
from unified_rl.backbones.load import load_backbone
from unified_rl.ledger import Run
from unified_rl.runtime import EXIT_OK, sample_seed
from unified_rl.train.batching import global_batches
from unified_rl.train.checkpoints import folder_of, read_checkpoint
from unified_rl.train.drawing import frozen_sha256
from unified_rl.train.export import export_checkpoint
from unified_rl.train.samples import load_iteration

UPDATES = {
    "grpo": ["policy.steps_per_update=3"],
    "weighted": ["policy.objective=reward_weighted", "rollout.flow.eta=0", "policy.hidden_prompts=0.2"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, random_janus_folder: Path) -> dict[str, Run]:
    """Each update for two iterations on two ranks, the second in a new start from the checkpoint of the first."""
    folder = tmp_path_factory.mktemp("bagel")
    build_random_bagel(folder / "checkpoint")
    runs = {
        name: open_scored_run(
            folder / name, folder / "checkpoint", "reward.domain=log", *overrides, recipe="gvu_bagel_shapes"
        )
        for name, overrides in UPDATES.items()
    }
    runs["tokens"] = open_scored_run(folder / "tokens", random_janus_folder, "policy.objective=reward_weighted")
    runs["one"] = copy_run(runs["grpo"], folder / "one")
    assert train_with(1, folder / "codes", f"{runs['one'].path}:0") == [EXIT_OK]
    firsts = [f"{runs[name].path}:0" for name in (*UPDATES, "tokens")]
    assert train_with(2, folder / "codes", *firsts) == [EXIT_OK, EXIT_OK, EXIT_OK]
    for name in UPDATES:
        draw_and_score(runs[name], 1)
    runs["again"] = copy_run(runs["weighted"], folder / "again")
    codes = train_with(2, folder / "codes", *(f"{runs[name].path}:1" for name in (*UPDATES, "again")))
    assert codes == [EXIT_OK, EXIT_OK, EXIT_OK]
    return runs


def test_ratio_is_one_before_the_first_update_and_after_a_resume(runs):
    for iteration in (0, 1):
        rows = metrics_of(runs["grpo"], iteration)
        assert rows[0]["ratio/initial_max_deviation"] <= 1e-4 < rows[0]["grad_norm"]
    assert metrics_of(runs["grpo"])[0]["kl"] < 1e-9 < metrics_of(runs["grpo"], 1)[0]["kl"]


def test_one_rank_gives_the_same_update(runs):
    assert distance(weights_of(runs["one"]), weights_of(runs["grpo"])) <= 1e-6


def test_weighted_update_logs_its_terms_and_repeats_exactly(runs):
    rows = metrics_of(runs["weighted"]) + metrics_of(runs["weighted"], 1)
    assert len(rows) == 4 and all("ratio/mean" not in row and row["weighted/weight_min"] >= 0 for row in rows)
    lambda_ = runs["weighted"].config.policy.reference_weight
    for row in rows:
        unfloored = row["weighted/reward_loss"] + lambda_ * row["weighted/reference_loss"]
        assert row["policy/loss"] >= unfloored - 1e-6  # the floor lets go of cells, it pushes none
    assert metrics_of(runs["again"], 1) == metrics_of(runs["weighted"], 1)
    assert policy_bytes(runs["again"], 1) == policy_bytes(runs["weighted"], 1)


def test_tokens_are_weighted_cell_by_cell_too(runs):
    """The first step's reference loss is the plain cross-entropy of the drawn tokens under the base weights."""
    run = runs["tokens"]
    data = load_iteration(run, 0)
    order = global_batches(range(len(data.groups)), 3, [sample_seed(run.config.seed, 0, "order", 0)])
    samples = [data.samples[i] for group in order[0] for i in data.groups[group]]
    drawn = [float(s.tensors["log_probs"].mean()) for s in samples]
    assert metrics_of(run)[0]["weighted/reference_loss"] == pytest.approx(-statistics.fmean(drawn), rel=1e-5)
    expected = [max(0.0, min(1.0, max(-1.0, s.advantage / 2)) + 0.5) * -d for s, d in zip(samples, drawn, strict=True)]
    assert metrics_of(run)[0]["policy/loss"] == pytest.approx(statistics.fmean(expected), rel=1e-5)


@pytest.mark.parametrize("name", UPDATES)
def test_what_reads_never_moves(runs, name):
    run = runs[name]
    backbone = load_backbone(run.config.backbone)
    before = frozen_sha256(backbone.model, backbone.trainable_names("full"))
    assert [read_checkpoint(run, k).frozen_sha256 for k in (0, 1)] == [before, before]
    weights = weights_of(run, 1)
    assert weights and all(BagelBackbone.trained_in_full(tensor) for tensor in weights)
    original = load_file(Path(run.config.backbone.path) / "ema.safetensors")
    assert any(not torch.equal(value, original[tensor]) for tensor, value in weights.items())


@pytest.mark.parametrize("name", UPDATES)
def test_checkpoint_holds_nothing_of_the_frozen_half(runs, name):
    run = runs[name]
    trained = sum(tensor.numel() for tensor in weights_of(run, 1).values())
    files = sorted(folder_of(run, 1).glob("*.pt"))
    assert len(files) >= 4  # model and optimizer states of two ranks
    stored = [tensor for file in files for tensor in tensors_in(torch.load(file, weights_only=False))]
    # fp32 parameters and two moments, padded to equal parts.
    assert trained * 3 <= sum(t.numel() for t in stored) <= trained * 3 * 1.1
    assert frozen_numbers(run) > trained * 3 * 0.1  # so that the frozen half would be noticed


def tensors_in(value: object) -> list[torch.Tensor]:
    """All tensors anywhere in a checkpoint's state but counters and random states."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in tensors_in(part)] if isinstance(value, list | tuple) else []


def frozen_numbers(run: Run) -> int:
    """Size of the frozen half."""
    names = load_file(Path(run.config.backbone.path) / "ema.safetensors")
    return sum(value.numel() for name, value in names.items() if not BagelBackbone.trained_in_full(name))


def test_export_is_a_checkpoint_of_the_public_layout(runs, tmp_path):
    export_checkpoint(runs["weighted"], tmp_path / "whole", 1)
    exported, original = (
        load_file(Path(folder) / "ema.safetensors")
        for folder in (tmp_path / "whole", runs["weighted"].config.backbone.path)
    )
    weights = weights_of(runs["weighted"], 1)
    assert exported.keys() == original.keys()
    assert all(torch.equal(value, weights.get(name, original[name])) for name, value in exported.items())
    BagelBackbone.from_pretrained(tmp_path / "whole")
