"""Kill -9 of the whole process group at random moments of a loop; the same command again; the same bits at the end.

KILLS=20 pytest tests/test_kill_resume.py -m slow -s   kills one loop after the other. `make drill` knows more faults.
"""

import os
import random

import pytest

from tests.drill.__main__ import undisturbed
from tests.drill.comparison import snapshot
from tests.drill.loops import ASK_SOLVE_GENERATE, ENVIRONMENT, GVU, ITERATIONS, Loop


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("method", "policies", "follow"),
    [(GVU, 2, ""), (GVU, 2, "1"), (ASK_SOLVE_GENERATE, 5, "")],
    ids=["gvu", "gvu_follow", "ask_solve_generate"],
)
def test_killed_and_restarted_loop_ends_with_the_same_bits(tmp_path, monkeypatch, method, policies, follow):
    whole, seconds = undisturbed(tmp_path, method)
    monkeypatch.setitem(ENVIRONMENT, "FOLLOW", follow)
    rng = random.Random(int(os.environ.get("KILL_SEED", "0")))
    loops = [Loop(tmp_path / "killed-0", tmp_path / "prompts", tmp_path / "killed-0.log", method)]
    kills = 0
    while kills < int(os.environ.get("KILLS", "3")):
        loop = loops[-1]
        loop.start()
        if loop.let_run(rng.uniform(0.05, 0.6) * ITERATIONS * sum(seconds.values())):
            loop.kill()
            kills += 1
            print(f"kill {kills} of {loop.run.name}", flush=True)
            continue
        assert loop.process.returncode == 0, loop.said()
        assert snapshot(loop.run).differences(whole) == []
        name = f"killed-{len(loops)}"  # finished before the kill: another run, so that every kill counts
        loops.append(Loop(tmp_path / name, tmp_path / "prompts", tmp_path / f"{name}.log", method))
    loops[-1].start()
    assert loops[-1].end() == 0, loops[-1].said()
    assert snapshot(loops[-1].run).differences(whole) == []
    assert len(list((tmp_path / "whole").glob("iter_*/policy/**/*.safetensors"))) == policies
