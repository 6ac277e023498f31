import numpy as np
import pytest
import torch

from unified_rl.config import PolicyConfig, open_run
from unified_rl.ledger import Run
from unified_rl.manifests import LedgerError, Manifest
from unified_rl.records import PromptRecord, RewardRecord, RolloutRecord
from unified_rl.shards import write_records
from unified_rl.train.samples import Sample, load_iteration, with_update
from unified_rl.train.zero3 import TrainError

GROUPS = {"a": [0.1, 0.2, 0.3], "b": [0.5, 0.5, 0.5], "c": [0.4, None, 0.6], "d": [0.9, 0.8, 0.1]}


def rollout_record(prompt_id, sample, version, **changes):
    prompt = PromptRecord(prompt_id, f"text {prompt_id}")
    tensors = {"actions": torch.tensor([sample, 2]), "log_probs": torch.tensor([-1.0, -2.0])}
    sampling = {"temperature": 1.0, "guidance_scale": 1.0}
    image = np.zeros((4, 4, 3), np.uint8)
    return RolloutRecord(
        **{"prompt": prompt, "sample": sample, "seed": 1, "policy_version": version, "sampling": sampling,
           "image": image, "tensors": tensors, **changes}
    )  # fmt: skip


def reward_record(prompt_id, sample, version, value):
    state = {"status": "failed", "reason": "no"} if value is None else {"status": "ok"}
    tensors = {"token_log_probs": torch.tensor([-1.0]), "reference_log_probs": torch.tensor([-1.5, -2.5])}
    return RewardRecord(
        f"{prompt_id}_{sample:02d}", prompt_id, reward=value, policy_version=version, components={}, tokens=["x"],
        tensors={} if value is None else tensors, **state,
    )  # fmt: skip


def make_run(folder, rollouts, rewards, version="base", *overrides):
    fixed = ["rollout.group_size=3", "backbone.path=x", "data.prompts=x", *overrides]
    run = Run(folder, open_run(folder, "gvu_janus_shapes", fixed))
    for stage, records in (("rollout", rollouts), ("reward", rewards)):
        info = write_records(run.stage_folder(0, stage) / "shard-00000.tar", records)
        run.commit(Manifest(stage, 0, [info], version, run.config_hash, {"images": len(records)}))
    return run


def records(version="base", groups=GROUPS):
    places = [(p, i, v) for p, values in groups.items() for i, v in enumerate(values)]
    rollouts = [rollout_record(p, i, version) for p, i, _ in places]
    return rollouts, [reward_record(p, i, version, v) for p, i, v in places]


def test_groups_advantages_and_counts(tmp_path):
    data = load_iteration(make_run(tmp_path / "run", *records()), 0)
    assert [s.key for s in data.samples] == [f"{p}_{i:02d}" for p in "abd" for i in range(3)]  # c has a failed member
    assert data.groups == [[0, 1, 2], [6, 7, 8]]  # b has no spread
    assert (data.failed_groups, data.zero_std_groups) == (1, 1)
    assert data.zero_std_share == pytest.approx(1 / 3)
    assert [s.advantage for s in data.samples[:3]] == pytest.approx([-1, 0, 1], abs=1e-6)
    assert data.reward_mean == pytest.approx((0.6 + 1.5 + 1.8) / 9)
    sample = data.samples[7]
    assert (sample.prompt, sample.reward, sample.tensors["actions"].tolist()) == ("text d", 0.8, [1, 2])
    assert sample.tensors["log_probs"].tolist() == [-1.0, -2.0] and sample.reference.tolist() == [-1.5, -2.5]
    assert data.sampling == {"temperature": 1.0, "guidance_scale": 1.0}


def test_order_of_samples_in_the_shards_does_not_matter(tmp_path):
    rollouts, rewards = records()
    shuffled = load_iteration(make_run(tmp_path / "run", rollouts, rewards[::-1]), 0)
    assert [s.reward for s in shuffled.samples] == [0.1, 0.2, 0.3, 0.5, 0.5, 0.5, 0.9, 0.8, 0.1]


def test_samples_of_another_policy_are_refused(tmp_path):
    with pytest.raises(TrainError, match="made with policy 0003-abc, the current policy of iteration 0 is base"):
        load_iteration(make_run(tmp_path / "all", *records("0003-abc"), "0003-abc"), 0)
    rollouts, rewards = records()
    rollouts[4].policy_version = "0003-abc"
    with pytest.raises(TrainError, match="b_01 was made with policy 0003-abc"):
        load_iteration(make_run(tmp_path / "one", rollouts, rewards), 0)


def test_missing_stage_names_the_command(tmp_path):
    run = Run(tmp_path, open_run(tmp_path, "gvu_janus_shapes", ["backbone.path=x", "data.prompts=x"]))
    with pytest.raises(LedgerError, match="python -m unified_rl.rollout"):
        load_iteration(run, 0)


def test_what_does_not_fit_together_is_refused(tmp_path):
    rollouts, rewards = records()
    with pytest.raises(TrainError, match="lack their rollout or reward, first d_02"):
        load_iteration(make_run(tmp_path / "1", rollouts, rewards[:-1]), 0)
    with pytest.raises(TrainError, match="prompt d has 2 samples, rollout.group_size=3"):
        load_iteration(make_run(tmp_path / "2", rollouts[:-1], rewards[:-1]), 0)
    warmer = {"temperature": 0.5, "guidance_scale": 1.0}
    mixed = [rollout_record("a", 0, "base", sampling=warmer), *rollouts[1:]]
    with pytest.raises(TrainError, match="2 different sampling settings"):
        load_iteration(make_run(tmp_path / "3", mixed, rewards), 0)
    rewards[0].tensors["reference_log_probs"] = torch.zeros(3)
    with pytest.raises(TrainError, match="a_00: 2 actions but 3 reference log-probs"):
        load_iteration(make_run(tmp_path / "4", rollouts, rewards), 0)


def test_nothing_but_failures_is_an_error(tmp_path):
    with pytest.raises(TrainError, match="every group has a failed score"):
        load_iteration(make_run(tmp_path / "run", *records(groups={"a": [None, 0.1, 0.2]})), 0)


def test_nothing_but_skipped_scores_is_nothing_to_learn_from(tmp_path):
    rollouts, rewards = records(groups={"a": [None, 0.1, 0.2]})
    rewards[0].status = "skipped"
    data = load_iteration(make_run(tmp_path / "run", rollouts, rewards), 0)
    assert (data.samples, data.groups, data.failed_groups) == ([], [], 1)


def test_shuffled_control_moves_rewards_between_groups(tmp_path):
    groups = {f"p{i}": [i + 0.1, i + 0.2, i + 0.3] for i in range(8)}
    run = make_run(tmp_path / "run", *records(groups=groups), "base", "policy.control=shuffled")
    data = load_iteration(run, 0)
    true, used = [s.reward for s in data.samples], [s.used_reward for s in data.samples]
    assert used != true and sorted(used) == sorted(true)
    moved = sum(int(u) != int(t) for u, t in zip(used, true, strict=True))
    assert moved > len(true) / 2  # to other groups, not only within their own
    first = torch.tensor(used[:3], dtype=torch.float64)
    assert [s.advantage for s in data.samples[:3]] == pytest.approx(((first - first.mean()) / first.std()).tolist())
    assert [s.used_reward for s in load_iteration(run, 0).samples] == used  # fixed by seed and iteration


def test_control_none_uses_each_samples_own_reward():
    samples = [Sample(str(i), "", {}, None, None, float(i), float(i)) for i in range(4)]
    filled, live = with_update(samples, 2, PolicyConfig(), 0)
    assert [s.used_reward for s in filled] == [0.0, 1.0, 2.0, 3.0] and live == [True, True]
