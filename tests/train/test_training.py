"""Training with real ranks under ZeRO-3; every launch serves several tests."""

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.conftest import (
    GROUP_SIZE,
    ROOT,
    copy_run,
    draw_and_score,
    environment,
    free_port,
    open_scored_run,
    train_with,
)
from unified_rl.backbones.base import Sampling, stack_trajectories
from unified_rl.backbones.load import load_backbone
from unified_rl.files import sha256_file
from unified_rl.policy.grpo import grpo_loss
from unified_rl.records import RewardRecord, RolloutRecord
from unified_rl.runtime import EXIT_OK, EXIT_STOPPED, sample_seed
from unified_rl.shards import read_records, write_records
from unified_rl.train.batching import global_batches
from unified_rl.train.checkpoints import folder_of, read_checkpoint
from unified_rl.train.drawing import different, frozen_sha256
from unified_rl.train.export import export_checkpoint
from unified_rl.train.samples import load_iteration

pytestmark = pytest.mark.timeout(600)
VOLATILE = ("time/", "throughput/", "memory/")


def metrics_of(run, iteration=0):
    text = (run.path / f"iter_{iteration:04d}/train/metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in row.items() if not any(part in k for part in VOLATILE)} for row in rows]


def weights_of(run, iteration=0):
    return load_file(run.policy_folder(iteration) / "model.safetensors")


def policy_bytes(run, iteration):
    return sha256_file(run.policy_folder(iteration) / "model.safetensors")


def distance(a, b):
    """Relative distance of two sets of tensors."""
    assert a.keys() == b.keys()
    square = sum((a[k].double() - b[k].double()).square().sum() for k in a)
    return float((square / sum(b[k].double().square().sum() for k in b)).sqrt())


@pytest.fixture(scope="module")
def two_ranks(scored_run, tmp_path_factory):
    """Iteration 0 through the deepspeed launcher, as launch/train.sh starts it; iteration 1 drawn and scored."""
    run = copy_run(scored_run, tmp_path_factory.mktemp("two") / "run")
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [
        sys.executable, str(launcher), "--num_gpus", "2", "--master_port", free_port(), "--no_local_rank",
        "--module", "unified_rl.train", "--run", str(run.path), "--iteration", "0",
    ]  # fmt: skip
    result = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "took" in result.stderr  # a plain progress line
    assert run.read_status()["world_size"] == 2
    draw_and_score(run, 1)
    return run


@pytest.fixture(scope="module")
def more_runs(two_ranks, scored_run, random_janus_folder, tmp_path_factory):
    """Everything else on two ranks, in one start."""
    folder = tmp_path_factory.mktemp("more")
    runs = {name: copy_run(two_ranks, folder / name) for name in ("straight", "leftovers", "marked")}
    junk = folder_of(runs["leftovers"], 1)
    junk.mkdir()
    (junk / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"half a file")
    train_folder = runs["leftovers"].stage_folder(1, "train")
    (train_folder / "metrics.jsonl").write_text('{"step": 99}\n{"ste')
    runs["stopped"] = copy_run(scored_run, folder / "stopped")
    lora = ["train.scope=lora", "train.lora.rank=4", "train.lora.alpha=8"]
    runs["lora"] = open_scored_run(folder / "lora", random_janus_folder, *lora)
    again = ["train.activation_checkpointing=1", "train.old_log_probs=recomputed"]
    runs["recomputed"] = open_scored_run(folder / "recomputed", random_janus_folder, *again)
    for run in (runs["lora"], runs["recomputed"]):
        for stage in ("rollout", "reward"):
            assert [s.sha256 for s in run.manifest(0, stage).shards] == [
                s.sha256 for s in scored_run.manifest(0, stage).shards
            ]
    codes = train_with(
        2, folder / "codes", f"{runs['straight'].path}:1", f"{runs['leftovers'].path}:1",
        f"{runs['stopped'].path}:0:stop", f"{runs['lora'].path}:0", f"{runs['recomputed'].path}:0",
    )  # fmt: skip
    assert codes == [EXIT_OK, EXIT_OK, EXIT_STOPPED, EXIT_OK, EXIT_OK]
    # As if the process had died between the checkpoint's marker and the policy.
    shutil.copytree(runs["straight"].path, runs["marked"].path, dirs_exist_ok=True)
    (runs["marked"].path / "iter_0001/train/manifest.json").unlink()
    shutil.rmtree(runs["marked"].policy_folder(1))
    draw_and_score(runs["lora"], 1)
    codes = train_with(
        2, folder / "codes", f"{runs['marked'].path}:1", f"{runs['stopped'].path}:0", f"{runs['lora'].path}:1"
    )
    assert codes == [EXIT_OK, EXIT_OK, EXIT_OK]
    return runs


def plain_training(run):
    """The same two steps in plain PyTorch: one process, whole batches, torch's own clipping and AdamW."""
    config = run.config
    backbone = load_backbone(config.backbone)
    rollouts, rewards = (
        {r.key: r for r in read_records(run.stage_folder(0, stage), run.manifest(0, stage), kind)}
        for stage, kind in (("rollout", RolloutRecord), ("reward", RewardRecord))
    )
    groups = [[f"p{i}_{j:02d}" for j in range(GROUP_SIZE)] for i in dict.fromkeys(k[1:-3] for k in rollouts)]
    named = dict(backbone.model.named_parameters())
    trained = {name: named[name].requires_grad_() for name in backbone.trainable_names("full")}
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=0.0)
    norms = []
    steps = global_batches(range(len(groups)), 3, [sample_seed(config.seed, 0, "order", 0)])
    for number, step in enumerate(steps):
        keys = [key for group in step for key in groups[group]]
        advantages = []
        for group in step:
            values = [rewards[key].reward for key in groups[group]]
            advantages += [(v - statistics.mean(values)) / (statistics.stdev(values) + 1e-8) for v in values]
        drawn = stack_trajectories([rollouts[key].tensors for key in keys])
        distribution = backbone.image_dist([rollouts[k].prompt.text for k in keys], drawn, Sampling())
        log_probs = distribution.log_prob(drawn.actions)
        delta = torch.stack([rewards[key].tensors["reference_log_probs"] for key in keys]) - log_probs
        loss, _ = grpo_loss(
            log_probs,
            drawn.log_probs,
            delta.exp() - delta - 1,
            torch.tensor(advantages), torch.ones_like(log_probs), 0.2, 0.2, 0.05,
        )  # fmt: skip
        optimizer.zero_grad()
        loss.mean().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (number + 1) / 3
        optimizer.step()
    return {name: p.detach() for name, p in trained.items()}, norms


def base_weights(run, names):
    named = dict(load_backbone(run.config.backbone).model.named_parameters())
    return {name: named[name].detach() for name in names}


def test_two_ranks_equal_plain_pytorch(two_ranks):
    expected, norms = plain_training(two_ranks)
    weights = weights_of(two_ranks)
    assert distance(weights, expected) <= 1e-5
    base = base_weights(two_ranks, weights)
    moved = {name: weights[name] - base[name] for name in weights}
    assert all(bool(delta.any()) for delta in moved.values())
    assert distance(moved, {name: expected[name] - base[name] for name in weights}) < 0.01
    assert [row["grad_norm"] for row in metrics_of(two_ranks)] == pytest.approx(norms, rel=1e-5)
    assert max(norms) > 1.0  # so that clipping has been at work


def test_ranks_do_not_change_the_result(two_ranks, scored_run, tmp_path):
    weights, rows = weights_of(two_ranks), metrics_of(two_ranks)
    wrong = copy_run(scored_run, tmp_path / "wrong")
    order = global_batches(range(6), 3, [sample_seed(wrong.config.seed, 0, "order", 0)])
    data = load_iteration(wrong, 0)
    key = data.samples[data.groups[order[0][1]][2]].key  # in the first optimiser step
    pretend_other_weights(wrong, key)
    for ranks in (1, 3):
        run = copy_run(scored_run, tmp_path / f"{ranks}")
        extra = [f"{wrong.path}:0"] if ranks == 1 else []
        codes = train_with(ranks, tmp_path / "codes", f"{run.path}:0", *extra)
        assert codes[0] == EXIT_OK
        assert distance(weights_of(run), weights) <= 1e-6
        for row, expected in zip(metrics_of(run), rows, strict=True):
            assert row == pytest.approx(expected, rel=1e-3, abs=1e-6)
        if ranks == 1:
            assert codes[1].startswith("TrainError") and f"sample {key}" in codes[1]
            assert wrong.manifest(0, "train") is None and not folder_of(wrong, 0).exists()


def pretend_other_weights(run, key):
    """Change one log-prob of one rollout, as other weights would."""
    folder, manifest = run.stage_folder(0, "rollout"), run.manifest(0, "rollout")
    records = list(read_records(folder, manifest, RolloutRecord))
    next(r for r in records if r.key == key).tensors["log_probs"][3] -= 0.5
    manifest.shards = [write_records(folder / "shard-00000.tar", records)]
    (folder / "manifest.json").unlink()
    run.commit(manifest)


def test_metrics_and_manifest(two_ranks):
    rows = metrics_of(two_ranks)
    assert [(row["iteration"], row["step"]) for row in rows] == [(0, 1), (0, 2)]
    names = {
        "reward", "reward_std", "frac_reward_zero_std", "policy/loss", "ratio/mean", "ratio/max_deviation",
        "clip/low_fraction", "clip/high_fraction", "kl", "entropy", "grad_norm", "lr", "advantage/abs_mean",
    }  # fmt: skip
    assert all(names <= row.keys() for row in rows)
    assert rows[0]["ratio/initial_max_deviation"] <= 1e-4 and "ratio/initial_max_deviation" not in rows[1]
    assert rows[0]["kl"] < 1e-8 < rows[1]["kl"]  # the base policy is the reference
    assert [row["lr"] for row in rows] == pytest.approx([1e-3 / 3, 2e-3 / 3])
    manifest = two_ranks.manifest(0, "train")
    assert manifest.counts == {"groups_used": 6, "groups_zero_std": 0, "groups_failed": 0, "steps": 2, "images": 24}
    assert manifest.extra["policy_sha256"] == policy_bytes(two_ranks, 0)
    assert manifest.extra["reward_mean"] == pytest.approx(two_ranks.manifest(0, "reward").extra["reward_mean"])
    assert two_ranks.current_policy(1)[1] == f"0000-{policy_bytes(two_ranks, 0)[:12]}"


def test_only_the_drawing_path_is_exported_and_nothing_else_moves(two_ranks):
    weights = weights_of(two_ranks)
    assert weights and all("vqmodel" not in n and "vision_model" not in n and "lm_head" not in n for n in weights)
    backbone = load_backbone(two_ranks.config.backbone)
    before = frozen_sha256(backbone.model, backbone.trainable_names("full"))
    backbone.load_policy(two_ranks.policy_folder(0))
    assert frozen_sha256(backbone.model, backbone.trainable_names("full")) == before
    assert read_checkpoint(two_ranks, 0).frozen_sha256 == before
    backbone.model.lm_head.weight.data[0, 0] += 1e-3
    assert different(before, frozen_sha256(backbone.model, backbone.trainable_names("full"))) == "lm_head.weight"


def test_second_iteration_continues(more_runs):
    rows = metrics_of(more_runs["straight"], 1)
    assert [row["step"] for row in rows] == [3, 4]
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 1e-3])  # warm-up went on, then ended
    assert rows[0]["ratio/initial_max_deviation"] <= 1e-4  # trained weights drew these samples, and are loaded again
    assert rows[0]["kl"] > 1e-6  # and they are no longer the reference


@pytest.mark.parametrize("name", ["leftovers", "marked"])
def test_interrupted_equals_uninterrupted(more_runs, name):
    assert policy_bytes(more_runs[name], 1) == policy_bytes(more_runs["straight"], 1)
    assert metrics_of(more_runs[name], 1) == metrics_of(more_runs["straight"], 1)
    assert more_runs[name].manifest(1, "train") == more_runs["straight"].manifest(1, "train")
    assert read_checkpoint(more_runs[name], 1) == read_checkpoint(more_runs["straight"], 1)


def test_stopped_run_repeats_its_iteration(more_runs, two_ranks):
    assert policy_bytes(more_runs["stopped"], 0) == policy_bytes(two_ranks, 0)
    assert metrics_of(more_runs["stopped"]) == metrics_of(two_ranks)


def test_activation_checkpointing_and_recomputed_log_probs_give_the_same_update(more_runs, two_ranks):
    assert distance(weights_of(more_runs["recomputed"]), weights_of(two_ranks)) <= 1e-5
    # Recomputed in the micro-batches of training: the same numbers to the last bit.
    assert metrics_of(more_runs["recomputed"], 0)[0]["ratio/initial_max_deviation"] == 0.0


def test_lora_trains_the_adapter_only_and_exports_it_for_peft(more_runs, tmp_path):
    from peft import PeftModel
    from transformers import JanusForConditionalGeneration

    run = more_runs["lora"]
    policy = run.policy_folder(1)
    adapter = load_file(policy / "adapter_model.safetensors")
    assert adapter and all(".lora_A." in name or ".lora_B." in name for name in adapter)
    assert any(bool(value.any()) for name, value in adapter.items() if ".lora_B." in name)
    assert metrics_of(run, 1)[0]["ratio/initial_max_deviation"] <= 1e-4
    base = JanusForConditionalGeneration.from_pretrained(run.config.backbone.path)
    theirs = PeftModel.from_pretrained(base, policy).merge_and_unload()
    export_checkpoint(run, tmp_path / "merged", 1)
    ours = JanusForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert distance(ours.state_dict(), theirs.state_dict()) < 1e-6
    original = JanusForConditionalGeneration.from_pretrained(run.config.backbone.path).state_dict()
    changed = {k for k, v in ours.state_dict().items() if not torch.equal(v, original[k])}
    assert changed and all("language_model.layers" in name for name in changed)


def test_whole_checkpoint_loads_with_transformers(two_ranks, tmp_path):
    from transformers import JanusForConditionalGeneration, JanusProcessor

    export_checkpoint(two_ranks, tmp_path / "whole", 0)
    state = JanusForConditionalGeneration.from_pretrained(tmp_path / "whole").state_dict()
    weights = weights_of(two_ranks)
    original = JanusForConditionalGeneration.from_pretrained(two_ranks.config.backbone.path).state_dict()
    assert state.keys() == original.keys()
    assert all(torch.equal(value, weights.get(name, original[name])) for name, value in state.items())
    JanusProcessor.from_pretrained(tmp_path / "whole")
