"""Rollout and reward stages on disk: any number of workers gives the same bytes; failures are states."""

import math

import pytest
import torch

from unified_rl.config import ConfigError, open_run
from unified_rl.ledger import Run
from unified_rl.manifests import Manifest, write_manifest
from unified_rl.records import PromptRecord, RewardRecord, RolloutRecord
from unified_rl.reward import stage as reward_stage
from unified_rl.reward.gvu import GvuScore
from unified_rl.rollout.stage import rollout
from unified_rl.runtime import EXIT_OK, Ranks
from unified_rl.shapes.prompts import prompt_records
from unified_rl.shards import read_records, write_records

SMALL = [
    "data.prompts_per_iteration=6",
    "rollout.group_size=3",
    "rollout.groups_per_shard=2",
    "rollout.groups_per_batch=2",
    "reward.batch_size=4",
]


def pack(folder, records):
    folder.mkdir(parents=True)
    info = write_records(folder / "prompts-00000.tar", records)
    write_manifest(folder, Manifest("prompts", 0, [info], "base", "", {"prompts": len(records)}))
    return folder


@pytest.fixture
def prompts(tmp_path):
    return pack(tmp_path / "prompts", prompt_records("train")[::20])


def make_run(path, prompts, *overrides):
    return Run(path, open_run(path, "gvu_janus_shapes", [f"data.prompts={prompts}", *SMALL, *overrides]))


def run_workers(stage, run, count):
    for rank in reversed(range(count)):
        assert stage(run, 0, Ranks(rank, rank, count)) == EXIT_OK


def tars(run, stage):
    return {p.name: p.read_bytes() for p in run.stage_folder(0, stage).iterdir() if p.suffix in (".tar", ".json")}


def records(run, stage, kind):
    return list(read_records(run.stage_folder(0, stage), run.require_manifest(0, stage), kind))


def test_one_two_and_three_workers_write_the_same_bytes(tmp_path, prompts):
    written = []
    for count in (1, 2, 3):
        run = make_run(tmp_path / f"run{count}", prompts)
        run_workers(rollout, run, count)
        run_workers(reward_stage.reward, run, count)
        written.append((tars(run, "rollout"), tars(run, "reward")))
    assert written[0] == written[1] == written[2]
    assert len(written[0][0]) == 3 + 3 + 1  # shards, their marks, the manifest


def test_records_fit_together(tmp_path, prompts):
    run = make_run(tmp_path / "run", prompts)
    run_workers(rollout, run, 1)
    run_workers(reward_stage.reward, run, 1)
    rollouts, rewards = records(run, "rollout", RolloutRecord), records(run, "reward", RewardRecord)
    assert [r.key for r in rollouts] == [r.key for r in rewards]
    assert len({r.seed for r in rollouts}) == len(rollouts) == 18
    for drawn, scored in zip(rollouts, rewards, strict=True):
        # The base policy drew these: its log-probs are the reference's.
        gap = (drawn.tensors["log_probs"] - scored.tensors["reference_log_probs"]).abs().max()
        assert gap < 1e-4
        mean = scored.tensors["token_log_probs"].double().mean().item()
        assert scored.reward == pytest.approx(math.exp(mean), rel=1e-6)
        assert scored.components["log_likelihood"] == pytest.approx(mean, rel=1e-6)
        assert "".join(scored.tokens).strip() == drawn.prompt.text
    manifest = run.require_manifest(0, "reward")
    assert manifest.counts == {"groups": 6, "images": 18, "failed": 0}
    assert manifest.extra["reward_mean"] == pytest.approx(sum(r.reward for r in rewards) / 18)


def test_a_lost_shard_is_made_again_and_a_finished_one_is_not(tmp_path, prompts):
    run = make_run(tmp_path / "run", prompts)
    folder = run.stage_folder(0, "rollout")
    assert rollout(run, 0, Ranks(0, 0, 2)) == EXIT_OK
    assert run.manifest(0, "rollout") is None  # the other worker's shards are missing
    whole = make_run(tmp_path / "whole", prompts)
    run_workers(rollout, whole, 1)
    (folder / "shard-00000.tar").write_bytes(b"half")
    untouched = (folder / "shard-00002.tar").stat().st_mtime_ns
    run_workers(rollout, run, 1)
    assert tars(run, "rollout") == tars(whole, "rollout")
    assert (folder / "shard-00002.tar").stat().st_mtime_ns == untouched


def test_the_number_of_workers_may_change_in_the_middle_of_a_stage(tmp_path, prompts):
    run, whole = make_run(tmp_path / "run", prompts), make_run(tmp_path / "whole", prompts)
    for stage, name in ((rollout, "rollout"), (reward_stage.reward, "reward")):
        run_workers(stage, whole, 1)
        assert stage(run, 0, Ranks(1, 1, 2)) == EXIT_OK
        assert run.manifest(0, name) is None
        assert stage(run, 0, Ranks(0, 0, 3)) == EXIT_OK
        assert run.manifest(0, name) is None
        run_workers(stage, run, 4)
        assert tars(run, name) == tars(whole, name)


def test_log_domain_and_live_judge(tmp_path, prompts):
    run = make_run(tmp_path / "run", prompts, "reward.domain=log", "reward.judge=live")
    run_workers(rollout, run, 1)
    run_workers(reward_stage.reward, run, 1)
    for record in records(run, "reward", RewardRecord):
        assert record.reward == record.components["log_likelihood"] < 0
        assert record.components["frozen_likelihood"] == pytest.approx(record.components["likelihood"], rel=1e-5)


def broken_scores(bad):
    """gvu_scores with the prompts in `bad` judged NaN."""

    def scores(judge, images, prompts, question):
        values = [math.nan if p in bad else -1.0 for p in prompts]
        return [GvuScore(["x"], torch.full((1,), v), v) for v in values]

    return scores


def test_a_failed_score_is_a_state_and_too_many_stop_the_stage(tmp_path, prompts, monkeypatch):
    run = make_run(tmp_path / "run", prompts, "reward.max_failed_share=0.2")
    run_workers(rollout, run, 1)
    texts = sorted({r.prompt.text for r in records(run, "rollout", RolloutRecord)})
    monkeypatch.setattr("unified_rl.reward.judges.gvu_scores", broken_scores(texts[:2]))
    with pytest.raises(reward_stage.RewardError, match=r"2 of 6 groups .*_00: the judge gave a non-finite"):
        reward_stage.reward(run, 0, Ranks(0, 0, 1))
    assert run.manifest(0, "reward") is None

    run = make_run(tmp_path / "tolerant", prompts, "reward.max_failed_share=0.5")
    run_workers(rollout, run, 1)
    run_workers(reward_stage.reward, run, 1)
    failed = [r for r in records(run, "reward", RewardRecord) if r.status == "failed"]
    assert len(failed) == 6
    assert {(r.reward, r.reason) for r in failed} == {(None, "the judge gave a non-finite log-likelihood")}
    manifest = run.require_manifest(0, "reward")
    assert manifest.counts["failed"] == len(manifest.failures) == 6
    assert manifest.extra["reward_mean"] == pytest.approx(math.exp(-1))


def test_failures_that_another_worker_brings_just_before_the_commit_stop_the_stage(tmp_path, prompts, monkeypatch):
    run = make_run(tmp_path / "run", prompts, "reward.max_failed_share=0")
    run_workers(rollout, run, 1)
    texts = {r.prompt.text for r in records(run, "rollout", RolloutRecord)}
    check, checks = reward_stage.check_failures, []

    def check_and_let_the_other_end(*arguments):
        check(*arguments)
        checks.append(arguments)
        if len(checks) == 1:
            monkeypatch.setattr("unified_rl.reward.judges.gvu_scores", broken_scores(texts))
            with pytest.raises(reward_stage.RewardError):
                reward_stage.reward(run, 0, Ranks(1, 1, 2))

    monkeypatch.setattr(reward_stage, "check_failures", check_and_let_the_other_end)
    with pytest.raises(reward_stage.RewardError, match="have a failed score"):
        reward_stage.reward(run, 0, Ranks(0, 0, 2))
    assert run.manifest(0, "reward") is None


def test_more_prompts_than_there_are_is_refused(tmp_path):
    run = make_run(tmp_path / "run", pack(tmp_path / "few", [PromptRecord("a", "a circle")]))
    with pytest.raises(ConfigError, match="only 1 prompts"):
        rollout(run, 0, Ranks(0, 0, 1))
