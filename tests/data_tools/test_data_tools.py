"""The scripts of data_tools, run as a user runs them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unified_rl.config import BackboneConfig, DataConfig, RunConfig, to_yaml
from unified_rl.ledger import Run
from unified_rl.manifests import read_manifest
from unified_rl.records import PromptRecord, RewardRecord, RolloutRecord
from unified_rl.shapes.prompts import prompt_records
from unified_rl.shards import load_prompts, read_records, write_records

ROOT = Path(__file__).resolve().parents[2]


def script(name, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "data_tools" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)


def pack(source, out, *more):
    return script("pack_prompts", source, "--out", out, *more)


@pytest.mark.parametrize("name", ["pack_prompts", "pack_images", "check_shards", "show_shards"])
def test_help_has_an_example(name):
    done = script(name, "--help")
    assert done.returncode == 0
    assert f"python data_tools/{name}.py " in done.stdout.split("example")[-1]


def test_pack_text(tmp_path):
    source = tmp_path / "prompts.txt"
    source.write_bytes("\ufeffa red circle\r\n\n  two blue squares \na red circle\nein gr\u00fcner Kreis".encode())
    done = pack(source, tmp_path / "out", "--per-shard", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"3 prompts in 2 shards in {tmp_path / 'out'}; 1 duplicates dropped\n"
    assert f"dropped {source}:4: same text as {source}:1: a red circle" in done.stderr
    prompts = load_prompts(tmp_path / "out")
    assert [p.text for p in prompts] == ["a red circle", "two blue squares", "ein gr\u00fcner Kreis"]
    assert len({p.prompt_id for p in prompts}) == 3
    assert read_manifest(tmp_path / "out").counts == {"prompts": 3}


def test_pack_twice_and_pack_something_else(tmp_path):
    source, out = tmp_path / "prompts.txt", tmp_path / "out"
    source.write_text("a\nb\n")
    pack(source, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert pack(source, out).returncode == 0
    source.write_text("a\nc\n")
    done = pack(source, out)
    assert done.returncode == 1
    assert "already holds other prompts" in done.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_unfinished_packing_is_replaced(tmp_path):
    source, out = tmp_path / "prompts.txt", tmp_path / "out"
    out.mkdir()
    (out / "prompts-00007.tar").write_bytes(b"of a killed run")
    source.write_text("a\n")
    assert pack(source, out).returncode == 0
    assert sorted(os.listdir(out)) == ["manifest.json", "prompts-00000.tar"]


def test_ids_follow_from_the_text(tmp_path):
    ids = []
    for number, text in enumerate(["a\nb\n", "c\nb\n"]):
        source = tmp_path / f"{number}.txt"
        source.write_text(text)
        pack(source, tmp_path / str(number))
        ids.append({p.text: p.prompt_id for p in load_prompts(tmp_path / str(number))})
    assert ids[0]["b"] == ids[1]["b"]


def test_pack_jsonl(tmp_path):
    source = tmp_path / "prompts.jsonl"
    geneval = {"tag": "counting", "include": [{"class": "circle", "count": 2}], "prompt": "two circles"}
    lines = [
        geneval,
        {"text": "a line\u2028separator", "prompt_id": "mine", "note": 3},
        {"prompt": "only a prompt"},
        {"text": "nested", "metadata": {"tag": "colors"}},
    ]
    source.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    done = pack(source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    prompts = load_prompts(tmp_path / "out")
    assert [p.metadata for p in prompts] == [geneval, {"note": 3}, {}, {"tag": "colors"}]
    assert prompts[1] == PromptRecord("mine", "a line\u2028separator", {"note": 3})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"text": "a"}\n{"text": ', ":2: not valid JSON"),
        ("p.jsonl", b'{"text": "a"}\n[]', ':2: expected an object with "text" or "prompt"'),
        ("p.jsonl", b'{"text": 3}', ":1: expected an object"),
        ("p.jsonl", b'{"text": "a", "x": NaN}', ":1: not valid JSON"),
        ("p.jsonl", b'{"text": "a", "prompt_id": "a.b"}', ":1: prompt_id 'a.b' must match"),
        ("p.jsonl", b'{"text": "a", "prompt_id": "i"}\n{"text": "b", "prompt_id": "i"}', ":2: prompt_id i is also"),
        ("p.jsonl", b'{"text": " "}', ":1: .*text is empty"),
        ("p.jsonl", b'{"text": "a", "metadata": 3}', ":1: metadata must be"),
        ("p.txt", b"a\n\xff\n", ":2: not UTF-8"),
        ("p.txt", b"\n \n", "holds no prompts"),
        ("p.txt", b"x" * 40000, ":1: .*longer than"),
    ],
)
def test_bad_prompt_files_name_the_line(tmp_path, name, content, message):
    source = tmp_path / name
    source.write_bytes(content)
    done = pack(source, tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {source}")
    assert re.search(message, done.stderr)
    assert not (tmp_path / "out").exists()


def test_missing_prompt_file_and_bad_arguments(tmp_path):
    done = pack(tmp_path / "none.txt", tmp_path / "out")
    assert done.returncode == 1
    assert "none.txt cannot be read: No such file" in done.stderr
    assert script("pack_prompts", "--out", tmp_path).returncode == 2
    assert pack(tmp_path / "p.txt", tmp_path, "--shapes", "train").returncode == 2
    assert pack(tmp_path / "p.txt", tmp_path, "--per-shard", 0).returncode == 2


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_pack_shapes(tmp_path, split):
    done = script("pack_prompts", "--shapes", split, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert load_prompts(tmp_path / "out") == prompt_records(split)


# A run without a model


@pytest.fixture
def run(tmp_path) -> Run:
    config = RunConfig(backbone=BackboneConfig(path="assets:none"), data=DataConfig(prompts="none"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(to_yaml(config))
    run = Run(tmp_path / "run", config)
    images = np.random.default_rng(0).integers(0, 256, (2, 2, 32, 32, 3), dtype=np.uint8)
    tensors = {"actions": torch.arange(4), "log_probs": -torch.ones(4)}
    scores = {"token_log_probs": -torch.ones(1), "reference_log_probs": -torch.ones(4)}
    for index in range(2):
        prompt = PromptRecord(f"p{index}", f"prompt {index} \u2713")
        rollouts = [RolloutRecord(prompt, j, j, "base", {}, images[index, j], tensors) for j in range(2)]
        rewards = [
            RewardRecord(f"p{index}_00", f"p{index}", "base", "ok", 0.5, {}, "", ["a"], scores),
            RewardRecord(f"p{index}_01", f"p{index}", "base", "failed", None, {}, "no score"),
        ]
        for stage, records in (("rollout", rollouts), ("reward", rewards)):
            info = write_records(run.stage_folder(0, stage) / f"shard-{index:05d}.tar", records)
            run.mark_shard(0, stage, index, info, {"groups": 1, "images": 2})
    for stage in ("rollout", "reward"):
        assert run.commit_if_complete(0, stage, 2, "base")
    return run


def test_check_a_good_run(run):
    done = script("check_shards", run.path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("ok  ") and "2 samples" in line for line in lines[:4])
    assert lines[4] == "no problems"


def test_check_finds_every_problem(run):
    folder = run.path / "iter_0000/rollout"
    for index, change in ((0, lambda d: d[:5000]), (1, lambda d: d[:600] + b"?" + d[601:])):
        path = folder / f"shard-{index:05d}.tar"
        path.write_bytes(change(path.read_bytes()))
    (folder / "shard-00009.tar").write_bytes(b"")
    (run.path / "iter_0000/reward/manifest.json").write_text("{}")
    done = script("check_shards", run.path)
    assert done.returncode == 1
    problems = [line for line in done.stdout.splitlines() if line.startswith("BAD ")]
    assert len(problems) == 4
    assert "rollout/shard-00000.tar is truncated" in problems[0]
    assert "rollout/shard-00001.tar is damaged" in problems[1]
    assert "rollout/shard-00009.tar is not in the manifest" in problems[2]
    assert "reward/manifest.json has schema version None" in problems[3]
    assert done.stdout.splitlines()[-1] == "4 problems"


def test_check_compares_the_stages(run):
    folder = run.path / "iter_0000/reward"
    (folder / "manifest.json").unlink()
    run.commit_if_complete(0, "reward", 1, "base")
    done = script("check_shards", run.path)
    assert done.returncode == 1
    assert "key p1_00 is in one of rollout and reward only" in done.stdout


def test_check_folders_and_lone_tars(run, tmp_path):
    folder = run.path / "iter_0000/rollout"
    done = script("check_shards", folder, folder / "shard-00000.tar", tmp_path)
    assert done.returncode == 0, done.stdout
    assert "sha256 " in done.stdout
    assert f"--  {tmp_path} is not committed" in done.stdout
    done = script("check_shards", tmp_path / "none.tar")
    assert done.returncode == 1
    assert "none.tar is missing" in done.stdout


def test_contact_sheet(run, tmp_path):
    out = tmp_path / "sheet.png"
    done = script("show_shards", run.path, "--iteration", 0, "--groups", 5, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}: 2 prompts, 4 images\n"
    with Image.open(out) as sheet:
        pixels = np.asarray(sheet)
    record = next(iter(read_records(run.stage_folder(0, "rollout"), run.manifest(0, "rollout"), RolloutRecord)))
    # First cell: a gap of 6, a text line of 14, 112 pixels for 32: the corner pixel is a block of at least 3.
    assert np.array_equal(pixels[20, 6], record.image[0, 0])
    assert np.array_equal(pixels[20 + 111, 6 + 111], record.image[31, 31])


def test_contact_sheet_without_rewards_and_without_rollouts(run, tmp_path):
    (run.path / "iter_0000/reward/manifest.json").unlink()
    assert script("show_shards", run.path, "--out", tmp_path / "sheet.png").returncode == 0
    done = script("show_shards", run.path, "--iteration", 4, "--out", tmp_path / "x.png")
    assert done.returncode == 1
    assert "rollout of iteration 4 is not finished" in done.stderr
    assert not (run.path / "iter_0004").exists()
