"""A reward stage that follows its rollout: the same bits as one that comes after it, whatever dies on the way."""

import os
import signal
import time
from contextlib import contextmanager, suppress

import pytest

from tests.made_run import pack
from tests.test_crashes import kill_self, run_forked
from unified_rl.backbones.load import load_backbone
from unified_rl.config import open_run
from unified_rl.ledger import LOCKS, Run
from unified_rl.manifests import temporaries_in
from unified_rl.reward import following
from unified_rl.reward.following import RolloutFailedError, RolloutGoneError
from unified_rl.reward.stage import main, reward
from unified_rl.rollout.stage import rollout
from unified_rl.runtime import EXIT_OK, EXIT_STOPPED, Ranks, StageError, run_stage
from unified_rl.shapes.prompts import prompt_records
from unified_rl.shards import ShardError
from unified_rl.status import is_locked

SMALL = [
    "data.prompts_per_iteration=6", "rollout.group_size=2", "rollout.groups_per_shard=2", "rollout.groups_per_batch=2",
    "reward.batch_size=4", "backbone.threads=1",
]  # fmt: skip
SHARDS = 3
ONE, HALF = Ranks(0, 0, 1), Ranks(0, 0, 2)  # HALF: shards 0 and 2
PATIENCE = 0.2
WAIT_SECONDS = 120


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return pack(tmp_path_factory.mktemp("packed") / "prompts", prompt_records("train")[::20])


@pytest.fixture(scope="module")
def whole(prompts, tmp_path_factory):
    """What the stages write one after the other."""
    run = make_run(tmp_path_factory.mktemp("whole") / "run", prompts)
    assert rollout(run, 0, ONE) == reward(run, 0, ONE) == EXIT_OK
    return content(run)


@pytest.fixture(scope="module")
def backbone(prompts, tmp_path_factory):
    """The tiny Janus, loaded once for all processes."""
    return load_backbone(make_run(tmp_path_factory.mktemp("any") / "run", prompts).config.backbone)


@pytest.fixture
def run(tmp_path, prompts, backbone, monkeypatch):
    monkeypatch.setattr(following, "POLL_SECONDS", 0.02)
    for place in ("unified_rl.reward.judges.load_backbone", "unified_rl.backbones.load.load_backbone"):
        monkeypatch.setattr(place, lambda *_, **__: backbone)
    return make_run(tmp_path / "run", prompts)


def make_run(path, prompts, recipe="gvu_janus_shapes"):
    return Run(path, open_run(path, recipe, [f"data.prompts={prompts}", *SMALL]))


def content(run):
    folder = run.iteration_folder(0)
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def follow(run, ranks=ONE, patience=PATIENCE):
    """As the stage does it, without its command line."""
    with run.lock(f"reward-{ranks.rank}"):
        return reward(run, 0, ranks, patience)


def draw(run, ranks=ONE):
    with run.lock(f"rollout-{ranks.rank}"):
        return rollout(run, 0, ranks)


def wait_until(true):
    deadline = time.monotonic() + WAIT_SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def beside(work):
    """`work` in a forked process beside the test, which must end well."""
    child = os.fork()
    if child == 0:
        code = 1
        temporaries_in.cache_clear()
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    try:
        yield child
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        child = 0
    finally:
        if child:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        temporaries_in.cache_clear()


def is_scored(run, index):
    return (run.iteration_folder(0) / f"reward/shard-{index:05d}.done.json").is_file()


def held_back(run, before=lambda index: None):
    """A rollout that draws no shard before the last one is scored."""
    mark = Run.mark_shard

    def mark_and_wait(self, iteration, stage, index, *rest):
        before(index)
        mark(self, iteration, stage, index, *rest)
        wait_until(lambda: is_scored(run, index))

    Run.mark_shard = mark_and_wait
    draw(run)


def test_a_follower_that_starts_first_ends_with_the_same_bits(run, whole):
    def drawing():
        wait_until(lambda: is_locked(run.path / LOCKS / "reward-0.lock"))
        held_back(run)

    with beside(drawing):
        assert follow(run, patience=WAIT_SECONDS) == EXIT_OK
    assert content(run) == whole


def test_two_followers_share_the_shards(run, whole):
    with beside(lambda: follow(run, Ranks(1, 1, 2), WAIT_SECONDS)), beside(lambda: held_back(run)):
        assert follow(run, HALF, WAIT_SECONDS) == EXIT_OK
    assert content(run) == whole


def test_a_rollout_that_never_comes_ends_the_follower_in_time(run, capsys):
    started = time.monotonic()
    with pytest.raises(RolloutGoneError, match="the rollout of iteration 0 is not finished, and for 0 s no process"):
        follow(run)
    assert time.monotonic() - started < 60
    arguments = ["--run", str(run.path), "--iteration", "0", "--follow", "--follow-timeout", "0.1"]
    with pytest.raises(SystemExit) as exit_:
        run_stage(lambda: main(arguments))
    assert exit_.value.code == EXIT_STOPPED
    assert "error: the rollout of iteration 0 is not finished" in capsys.readouterr().err
    with pytest.raises(StageError, match=r"run `python -m unified_rl.rollout .*` first"):
        reward(run, 0, ONE)


def test_a_killed_rollout_ends_the_follower_and_both_go_on(run, whole):
    def drawing():  # silent for longer than the follower's patience, but at work
        held_back(run, before=lambda index: kill_self() if index else time.sleep(5 * PATIENCE))

    with beside(lambda: run_forked(drawing)):
        wait_until(lambda: is_locked(run.path / LOCKS / "rollout-0.lock"))
        with pytest.raises(RolloutGoneError, match=r"rollout-0: process \d+ on .* was killed"):
            follow(run)
    assert is_scored(run, 0) and not is_scored(run, 1)
    assert draw(run) == EXIT_OK
    assert follow(run) == EXIT_OK
    assert content(run) == whole


def test_the_error_of_a_failed_rollout_is_the_follower_s(run):
    with pytest.raises(StageError), run.lock("rollout-0"):
        raise StageError("the disk is full")
    with pytest.raises(RolloutFailedError, match="rollout-0: .* failed: .*the disk is full") as error:
        follow(run)
    assert error.value.exit_code == 1


@pytest.mark.parametrize("call", ["fsync", "mark"])
def test_a_killed_follower_goes_on_with_the_same_bits(run, whole, monkeypatch, call):
    assert rollout(run, 0, HALF) == EXIT_OK

    def dying():
        if call == "mark":
            Run.mark_shard = kill_self
        else:
            monkeypatch.setattr(os, "fsync", kill_self)
        follow(run)

    assert run_forked(dying) == -signal.SIGKILL
    assert not is_scored(run, 0)
    with beside(lambda: held_back(run)):
        assert follow(run, patience=WAIT_SECONDS) == EXIT_OK
    assert content(run) == whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_follower_that_waits_stops_on_request(run, whole, number):
    assert rollout(run, 0, HALF) == EXIT_OK
    codes = []
    with beside(lambda: (wait_until(lambda: is_scored(run, 2)), os.kill(os.getppid(), number))):
        codes.append(follow(run, patience=WAIT_SECONDS))
    assert codes == [EXIT_STOPPED]
    assert rollout(run, 0, ONE) == follow(run) == EXIT_OK
    assert content(run) == whole


def test_a_damaged_shard_is_named_drawn_again_and_scored(run, whole):
    assert rollout(run, 0, HALF) == EXIT_OK
    path = run.iteration_folder(0) / "rollout/shard-00002.tar"
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"shard-00002.tar is damaged"):
        follow(run)
    assert is_scored(run, 0) and not is_scored(run, 2)
    assert draw(run) == follow(run) == EXIT_OK
    assert content(run) == whole


@pytest.mark.parametrize("restarted", [False, True])
def test_what_was_scored_of_other_bytes_than_the_manifest_names_is_scored_again(run, whole, monkeypatch, restarted):
    """As when a shard is lost and drawn again where drawing is not reproducible."""
    with monkeypatch.context() as patch:
        patch.setattr("unified_rl.rollout.stage.sample_seed", lambda *of: hash(of) % 2**32)
        assert rollout(run, 0, HALF) == EXIT_OK
    marks = [run.iteration_folder(0) / f"rollout/shard-0000{i}.done.json" for i in (0, 2)]
    if restarted:
        with pytest.raises(RolloutGoneError):
            follow(run)

    def drawing():
        wait_until(lambda: is_scored(run, 2))
        for mark in marks:
            mark.unlink()
        draw(run)

    with beside(drawing):
        assert follow(run, patience=WAIT_SECONDS) == EXIT_OK
    assert content(run) == whole


def test_srum_scores_shard_by_shard_too(tmp_path, run, prompts):
    whole, followed = (make_run(tmp_path / name, prompts, "srum_janus_shapes") for name in ("whole", "followed"))
    assert rollout(whole, 0, ONE) == reward(whole, 0, ONE) == rollout(followed, 0, HALF) == EXIT_OK
    with pytest.raises(RolloutGoneError):
        follow(followed)
    assert is_scored(followed, 0) and is_scored(followed, 2)
    assert rollout(followed, 0, ONE) == follow(followed) == EXIT_OK
    assert content(followed) == content(whole)
