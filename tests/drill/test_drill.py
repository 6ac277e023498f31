"""The drill itself, on about one fault of each kind."""

import os
import subprocess
import sys

import pytest

from tests.drill.__main__ import OUTCOMES, drill, table
from tests.drill.comparison import VERDICTS
from tests.drill.faults import KINDS
from tests.drill.loops import ROOT

FAULTS = 10


def test_help_has_an_example():
    command = [sys.executable, "-m", "tests.drill", "--help"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "example: python -m tests.drill --faults 200" in text


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_faults_change_nothing(tmp_path):
    seed = int(os.environ.get("SEED", "0"))
    summary, faults = drill(tmp_path, FAULTS, seed, lanes=1)
    print(table(summary))
    assert summary["faults"] == FAULTS == sum(summary[outcome] for outcome in OUTCOMES)
    assert not any(summary[verdict] for verdict in VERDICTS), faults
    hit = [kind for kind in KINDS if summary["by_kind"][kind]["faults"]]
    assert len(hit) >= len(KINDS) - 1 - len(summary["skipped"])  # one may find nothing to strike at
