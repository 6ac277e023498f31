"""Checks before a run: what is right passes, what is wrong is named with its remedy."""

import time

import pytest
import torch

from tests.made_run import pack
from unified_rl import disk, doctor
from unified_rl.config import RunConfig, resolve
from unified_rl.doctor import Finding
from unified_rl.ledger import Run
from unified_rl.shapes.prompts import prompt_records


@pytest.fixture
def config(tmp_path) -> RunConfig:
    pack(tmp_path / "prompts", prompt_records("train")[:20])
    return resolve(
        "gvu_janus_shapes", [f"data.prompts={tmp_path / 'prompts'}", "data.prompts_per_iteration=8",
                             "evaluate.prompts="],
    )  # fmt: skip


def only(findings) -> Finding:
    (finding,) = findings
    return finding


def test_requirements_are_those_of_setup():
    lines = doctor.requirements()
    assert "torch>=2.6" in lines and "safetensors" in lines
    assert only(doctor.packages(lines)).level == "ok"


def test_versions_compare_as_numbers():
    finding = only(doctor.packages(["numpy>=1.9", "numpy>=999.1", "no-such-package-at-all>=1"]))
    assert finding.level == "error"
    assert "999.1 or newer is needed; no-such-package-at-all is missing. Run `make install`" in finding.text


def test_file_system(tmp_path, monkeypatch):
    assert only(doctor.file_system(tmp_path / "runs" / "new")).level == "ok"
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(doctor, "LOCK", "import sys")
    assert "a second process gets a lock that is held" in only(doctor.file_system(tmp_path)).text
    file = tmp_path / "file"
    file.touch()
    assert only(doctor.file_system(file / "run")).level == "error"


def test_hard_links_are_missed_but_not_needed(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refused)
    assert only(doctor.file_system(tmp_path)).level == "warning"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without GPUs is told")
def test_devices(config):
    assert [f.level for f in doctor.devices(config)][0] == "ok"
    config.backbone.device = "cuda"
    assert next(doctor.devices(config)).level == "error"
    config.backbone.device, config.backbone.threads = "auto", 10_000
    first, second = doctor.devices(config)
    assert first.level == second.level == "warning"
    assert "torch sees no GPU" in first.text and "20000 threads" in second.text


def test_all_reduce(config):
    finding = only(doctor.all_reduce(config))
    assert (finding.level, finding.text[:19]) == ("ok", "gloo, 2 processes, ")


def test_an_all_reduce_that_hangs_is_ended(config, monkeypatch):
    monkeypatch.setattr(doctor, "ALL_REDUCE", "import time\nprint('ready', flush=True)\ntime.sleep(600)")
    started = time.monotonic()
    finding = only(doctor.all_reduce(config, seconds=0.5))
    assert time.monotonic() - started < 60
    assert finding.level == "error"
    assert "rank 0 had no answer within" in finding.text and "NCCL_SOCKET_IFNAME" in finding.text


def test_a_rank_that_fails_is_named(config, monkeypatch):
    program = "import sys\nprint('ready')\nsys.exit('no network' if sys.argv[3] == '1' else 0)"
    monkeypatch.setattr(doctor, "ALL_REDUCE", program)
    assert "rank 1: no network;" in only(doctor.all_reduce(config)).text


@pytest.mark.parametrize(("free", "level"), [(1000, "error"), (60 << 20, "warning"), (1 << 40, "ok")])
def test_room(config, tmp_path, monkeypatch, free, level):
    monkeypatch.setattr(disk, "free_bytes", lambda path: free)
    finding = only(doctor.room(Run(tmp_path / "run", config)))
    assert finding.level == level
    assert "rollout" in finding.text


def test_what_is_wrong_with_the_data_is_an_error_each(config, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "all_reduce", lambda config: iter([Finding("ok", "all-reduce", "not tried")]))
    assert {f.level for f in doctor.examine(tmp_path / "run", config)} <= {"ok", "warning"}
    config.data.prompts_per_iteration = 21
    config.train.ds_config = "zero3_bf16"
    config.backbone.path = str(tmp_path / "none")
    errors = {f.name: f.text for f in doctor.examine(tmp_path / "run", config) if f.level == "error"}
    assert errors.keys() == {"checkpoint", "data", "training", "disk"}
    assert "only 20 prompts" in errors["data"]
    assert "take another train.ds_config" in errors["training"]
    assert "config.json is missing" in errors["checkpoint"]


def test_command(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "all_reduce", lambda config: iter([Finding("ok", "all-reduce", "not tried")]))
    arguments = ["--run", str(tmp_path / "run"), "--recipe", "gvu_janus_shapes", "evaluate.prompts="]
    assert doctor.main([*arguments, f"data.prompts={config.data.prompts}", "data.prompts_per_iteration=8"]) == 0
    assert ": 8 for an iteration" in capsys.readouterr().out
    assert doctor.main([*arguments, "data.prompts=none"]) == 1
    assert "error   data" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        doctor.main(["--help"])
    assert "make doctor RUN=" in capsys.readouterr().out
