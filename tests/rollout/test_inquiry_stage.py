"""Ask-Solve-Generate's rollout and reward stages on real shards, with the tiny Janus and an unlabelled pool."""

import random
from dataclasses import replace

import pytest

from unified_rl.config import open_run
from unified_rl.inquiries import InquiryRecord, InquiryReward
from unified_rl.ledger import Run
from unified_rl.manifests import LedgerError, Manifest, write_manifest
from unified_rl.records import ImageRecord, RewardRecord, RolloutRecord
from unified_rl.report.html import write_report
from unified_rl.report.inquiries import questions_table, tasks_table
from unified_rl.report.tensorboard import write_tensorboard
from unified_rl.report.truth import first_shard, read_truth
from unified_rl.reward.following import RolloutGoneError
from unified_rl.reward.inquiry import InquiryState, score_inquiries
from unified_rl.reward.stage import reward, state_before
from unified_rl.rollout.stage import rollout
from unified_rl.runtime import EXIT_OK, Ranks
from unified_rl.shapes.prompts import prompt_records, scene_for
from unified_rl.shapes.world import render
from unified_rl.shards import read_records, write_records

SMALL = [
    "data.prompts_per_iteration=6", "rollout.groups_per_shard=2", "rollout.groups_per_batch=2", "rollout.group_size=2",
    "reward.batch_size=4", "self_consistency.answers=5", "self_consistency.references=5",
    "self_consistency.understanding=2", "self_consistency.generation=1", "reward.max_failed_share=0",
]  # fmt: skip
UNDERSTANDING, GENERATION = "self_consistency.generation=0", "self_consistency.understanding=0"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A pool of eight pictures in one shard, without labels."""
    folder = tmp_path_factory.mktemp("pool") / "images"
    folder.mkdir()
    scenes = [scene_for(p.metadata, random.Random(0)) for p in prompt_records("train")[::45]][:8]
    records = [ImageRecord(f"i{number}", render(scene)) for number, scene in enumerate(scenes)]
    info = write_records(folder / "images-00000.tar", records)
    ids = [[r.image_id for r in records]]
    write_manifest(folder, Manifest("images", 0, [info], "", "", {"images": 8}, extra={"image_ids": ids}))
    return folder


def make_run(path, images, *overrides):
    config = open_run(path, "self_consistency_janus_shapes", [f"data.images={images}", *SMALL, *overrides])
    return Run(path, config)


def run_workers(stage, run, count=1, iteration=0):
    for rank in reversed(range(count)):
        assert stage(run, iteration, Ranks(rank, rank, count)) == EXIT_OK


def files(run, iteration=0):
    folder = run.iteration_folder(iteration)
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def records(run, stage, kind, iteration=0):
    folder = run.stage_folder(iteration, stage)
    return list(read_records(folder, run.require_manifest(iteration, stage), kind))


@pytest.fixture(scope="module")
def understood(images, tmp_path_factory):
    """An understanding iteration by one worker."""
    run = make_run(tmp_path_factory.mktemp("understood") / "run", images, UNDERSTANDING)
    run_workers(rollout, run)
    run_workers(reward, run)
    return run


@pytest.fixture(scope="module")
def generated(images, tmp_path_factory):
    """A generation iteration by one worker."""
    run = make_run(tmp_path_factory.mktemp("generated") / "run", images, GENERATION)
    run_workers(rollout, run)
    run_workers(reward, run)
    return run


class Killed(Exception):
    """In the place of SIGKILL."""


@pytest.mark.parametrize("loop", [UNDERSTANDING, GENERATION])
def test_workers_and_kills_do_not_change_a_byte(request, tmp_path, images, monkeypatch, loop):
    whole = request.getfixturevalue("understood" if loop == UNDERSTANDING else "generated")
    run = make_run(tmp_path / "run", images, loop)
    mark = Run.mark_shard

    def killed_after_the_first(self, iteration, stage, index, *rest):
        mark(self, iteration, stage, index, *rest)
        raise Killed

    for stage in (rollout, reward):
        with monkeypatch.context() as patch:
            patch.setattr(Run, "mark_shard", killed_after_the_first)
            with pytest.raises(Killed):
                stage(run, 0, Ranks(1, 1, 2))
        assert run.manifest(0, stage.__name__) is None
        run_workers(stage, run, 2)
    assert files(run) == files(whole)


@pytest.mark.parametrize("loop", [UNDERSTANDING, GENERATION])
def test_reward_that_follows_the_rollout_writes_the_same_bytes(request, tmp_path, images, loop):
    whole = request.getfixturevalue("understood" if loop == UNDERSTANDING else "generated")
    run = make_run(tmp_path / "run", images, loop)
    assert rollout(run, 0, Ranks(1, 1, 2)) == EXIT_OK
    with pytest.raises(RolloutGoneError):
        reward(run, 0, Ranks(0, 0, 1), patience=0.0)
    assert len(list(run.stage_folder(0, "reward").glob("*.tar"))) == 1
    run_workers(rollout, run)
    assert reward(run, 0, Ranks(0, 0, 1), patience=0.0) == EXIT_OK
    assert files(run) == files(whole)


def test_inquiries_are_what_the_record_says(understood):
    asked, earned = records(understood, "rollout", InquiryRecord), records(understood, "reward", InquiryReward)
    manifests = [understood.require_manifest(0, stage) for stage in ("rollout", "reward")]
    assert [m.extra["loop"] for m in manifests] == ["understanding"] * 2
    assert [r.key for r in asked] == [r.key for r in earned] and len(asked) == 6
    questions = [q for r in asked for q in r.questions]
    skipped = sum(n for name, n in manifests[0].counts.items() if name.startswith("skipped/"))
    assert skipped == sum(bool(q["skipped"]) for q in questions)
    assert manifests[0].counts["questions"] == len(questions) == 18
    assert len({r.seed for r in asked}) == 6
    assert score_inquiries(asked[:2], InquiryState.start(), understood.config.self_consistency)[0].questions == (
        earned[0].questions
    )
    assert skipped < 18, "the tiny Janus asks no readable question"
    for record, (number, question) in ((r, q) for r in asked for q in enumerate(r.questions)):
        if not question["skipped"]:
            assert "".join(question["greedy_pieces"]).strip() == question["greedy"].strip()
            log_probs = record.tensors["answer_log_probs"][number]
            assert bool((log_probs <= 0).all()) and bool((log_probs[:, 0] < 0).any())


def test_answers_depend_on_their_seed_and_not_on_the_batch(understood, images, tmp_path):
    run = make_run(tmp_path / "run", images, UNDERSTANDING, "rollout.groups_per_batch=1")
    run_workers(rollout, run)
    for one, other in zip(
        records(run, "rollout", InquiryRecord), records(understood, "rollout", InquiryRecord), strict=True
    ):
        assert [q["answers"] for q in one.questions] == [q["answers"] for q in other.questions]
        assert [q["question"] for q in one.questions] == [q["question"] for q in other.questions]


@pytest.mark.parametrize("loop", [UNDERSTANDING, GENERATION])
def test_without_images_the_generator_draws_what_is_asked_about(images, tmp_path, loop):
    prompts = prompt_records("train")[:8]
    folder = tmp_path / "prompts"
    folder.mkdir()
    info = write_records(folder / "prompts-00000.tar", prompts)
    write_manifest(folder, Manifest("prompts", 0, [info], "", "", {"prompts": 8}))
    overrides = [loop, "self_consistency.imageless=true", f"data.prompts={folder}"]
    made = []
    for number, workers in enumerate((1, 2)):
        run = make_run(tmp_path / f"run-{number}", "unread", *overrides)
        run_workers(rollout, run, workers)
        run_workers(reward, run, workers)
        made.append(records(run, "rollout", InquiryRecord if loop == UNDERSTANDING else RolloutRecord))
    assert [r.key for r in made[0]] == [r.key for r in made[1]]
    if loop == UNDERSTANDING:
        assert {r.image_id for r in made[0]} <= {p.prompt_id for p in prompts} and len(made[0]) == 6
        assert len({r.image.tobytes() for r in made[0]}) == 6
        assert all((a.image == b.image).all() for a, b in zip(*made, strict=True))
    else:
        assert {r.prompt.metadata["image_id"] for r in made[0]} <= {p.prompt_id for p in prompts}


def test_the_state_is_carried_to_the_next_understanding_iteration(understood, images, tmp_path, monkeypatch):
    manifest = understood.require_manifest(0, "reward")
    scored = [q for r in records(understood, "reward", InquiryReward) for q in r.questions if not q["skipped"]]
    window = manifest.extra["state"]["window"]["values"]
    assert sorted(window) == sorted(q["token_entropy"] for q in scored)
    assert manifest.extra["metrics"]["skipped/share"] == pytest.approx(1 - len(scored) / 18)
    assert state_before(understood, 0) == InquiryState.start()
    assert state_before(understood, 1).window.values == tuple(window)
    run = make_run(tmp_path / "run", images)  # two of understanding, one of generation
    monkeypatch.setattr(run, "current_policy", lambda iteration: (None, "base"))
    for iteration in (0, 1):
        run_workers(rollout, run, iteration=iteration)
        run_workers(reward, run, iteration=iteration)
    for iteration in (2, 3):
        assert state_before(run, iteration) == InquiryState.from_dict(run.require_manifest(1, "reward").extra["state"])
    second = [q for r in records(run, "reward", InquiryReward, 1) for q in r.questions if not q["skipped"]]
    before = state_before(run, 1).window
    assert [q["rank"] for q in second] == [before.rank(q["token_entropy"]) for q in second]


def test_drawings_are_held_to_what_the_solver_sees(generated, images):
    drawn, scored = records(generated, "rollout", RolloutRecord), records(generated, "reward", RewardRecord)
    counts = generated.require_manifest(0, "rollout").counts
    skipped = sum(n for name, n in counts.items() if name.startswith("skipped/"))
    assert counts["inputs"] == 6 == counts["groups"] + skipped
    assert counts["images"] == len(drawn) == 2 * counts["groups"] > 0, "the tiny Janus writes no drawing task"
    assert [r.key for r in drawn] == [r.key for r in scored]
    for record in drawn:
        metadata = record.prompt.metadata
        assert metadata["image_id"] == record.prompt.prompt_id and 0.35 <= metadata["quality"] <= 1
        assert len(metadata["pairs"]) >= 2
    good = [r for r in scored if r.status == "ok"]
    weight = generated.config.self_consistency.cycle_weight
    assert good
    for record in good:
        parts = record.components
        assert 0 <= record.reward <= 1 and "reference_log_probs" in record.tensors
        mean = (0.65 * parts["fidelity"] + weight * parts["cycle"]) / (0.65 + weight)
        positive = mean - 0.20 * parts["contradiction"]
        assert record.reward == pytest.approx(parts["quality"] * min(max(positive, 0), 1))
    extra = generated.require_manifest(0, "reward").extra
    assert extra["fidelity_mean"] == pytest.approx(sum(r.components["fidelity"] for r in good) / len(good))


def test_an_iteration_without_a_single_task_goes_on(images, tmp_path):
    run = make_run(tmp_path / "run", images, GENERATION, "self_consistency.task_tokens=1")
    run_workers(rollout, run)
    run_workers(reward, run)
    counts = run.require_manifest(0, "rollout").counts
    assert (counts["inputs"], counts["images"]) == (6, 0)
    assert sum(n for name, n in counts.items() if name.startswith("skipped/")) == 6
    assert "reward_mean" not in run.require_manifest(0, "reward").extra


def test_a_report_shows_questions_votes_and_drawing_tasks(understood, generated):
    table = questions_table(read_truth(understood.path), 0)
    shown = [r for r in records(understood, "reward", InquiryReward)[0].questions if not r["skipped"]]
    assert shown and all(f"| {q['question']} |" in table for q in shown)
    truth = read_truth(generated.path)
    assert truth.scored() == [0] and read_truth(understood.path).scored() == []
    tasks = tasks_table(*first_shard(truth, 0))
    prompt = records(generated, "rollout", RolloutRecord)[0].prompt
    assert prompt.text in tasks and prompt.metadata["pairs"][0][0] in tasks
    for run in (understood, generated):
        for write in (write_tensorboard, write_report):
            assert write(read_truth(run.path)).exists()


def test_a_broken_state_is_named(understood, monkeypatch):
    manifest = understood.require_manifest(0, "reward")
    monkeypatch.setattr(understood, "require_manifest", lambda *_: replace(manifest, extra={}))
    with pytest.raises(LedgerError, match="iteration 0 has no usable state"):
        state_before(understood, 1)
