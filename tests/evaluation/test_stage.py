"""The evaluation stage on disk, with a painter of known skill instead of a model."""

import json
import re

import pytest
from PIL import Image

from tests.made_run import BY_PROMPT, finish, open_made_run, pretend_training, use_painter
from unified_rl.evaluation.compare import compare, table
from unified_rl.evaluation.evidence import evidence
from unified_rl.evaluation.folder import evaluation_folder, read_scores, require_scores
from unified_rl.evaluation.scoring import EvaluationError
from unified_rl.evaluation.stage import evaluate
from unified_rl.evaluation.summary import main as summary_main
from unified_rl.manifests import read_manifest
from unified_rl.records import PromptRecord, RolloutRecord
from unified_rl.report.timing import append_timing, read_timings, seconds_by_stage
from unified_rl.runtime import EXIT_OK, Ranks, sample_seed
from unified_rl.shapes.world import is_correct
from unified_rl.shards import read_records

ONE = Ranks(0, 0, 1)


@pytest.fixture(autouse=True)
def painter(monkeypatch):
    use_painter(monkeypatch)


def files(run, iteration):
    return {p.name: p.read_bytes() for p in evaluation_folder(run.path, iteration).iterdir()}


def images(run, iteration):
    folder = evaluation_folder(run.path, iteration)
    return list(read_records(folder, read_manifest(folder), RolloutRecord))


def test_scores_follow_from_the_images(tmp_path):
    run = open_made_run(tmp_path)
    assert evaluate(run, 0, ONE) == EXIT_OK
    scores, records = require_scores(run.path, 0), images(run, 0)
    assert len(records) == 24 * 4
    for record in records:
        outcome = scores["prompts"][record.prompt.prompt_id]
        assert outcome["correct"][record.sample] == is_correct(record.image, record.prompt.metadata)
        assert record.seed == sample_seed(run.config.seed, -1, record.prompt.prompt_id, record.sample)
    categories = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    assert scores["overall"] == pytest.approx(sum(scores[c] for c in categories) / 6)
    # The painter reads perfectly, so its choice is right wherever one image is.
    best = [any(o["correct"]) for o in scores["prompts"].values()]
    assert scores["best_of_g"] == pytest.approx(sum(best) / len(best))
    assert scores["caption_ranking"] == 1.0
    assert 0 < scores["question_answering"] < 1
    assert scores["policy_version"] == "base"
    assert len(scores["answers"]["caption_ranking"]) == 30


@pytest.mark.parametrize("workers", [2, 3])
def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path, workers):
    one, many = open_made_run(tmp_path / "one"), open_made_run(tmp_path / "many")
    evaluate(one, 0, ONE)
    for rank in range(workers):
        assert read_scores(many.path, 0) is None
        evaluate(many, 0, Ranks(rank, rank, workers))
    left, right = require_scores(one.path, 0), require_scores(many.path, 0)
    assert left == right
    tars = [{n: b for n, b in files(run, 0).items() if n.endswith(".tar")} for run in (one, many)]
    assert tars[0] == tars[1]


def test_committed_work_is_not_repeated(tmp_path, monkeypatch):
    run = open_made_run(tmp_path)
    evaluate(run, 0, ONE)
    before = files(run, 0)
    monkeypatch.setattr("unified_rl.backbones.load.load_backbone", None)  # a second drawing would call it
    assert evaluate(run, 0, ONE) == EXIT_OK
    assert files(run, 0) == before


def test_a_lost_shard_is_drawn_again_and_nothing_else(tmp_path):
    run = open_made_run(tmp_path)
    evaluate(run, 0, ONE)
    folder, before = evaluation_folder(run.path, 0), files(run, 0)
    times = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    (folder / "manifest.json").unlink()
    (folder / "shard-00001.tar").write_bytes(before["shard-00001.tar"][:-512])
    evaluate(run, 0, ONE)
    assert files(run, 0) == before
    assert (folder / "shard-00000.tar").stat().st_mtime_ns == times["shard-00000.tar"]


def test_base_and_tuned_weights_draw_with_the_same_seeds(tmp_path):
    run = open_made_run(tmp_path, "iterations=1")
    evaluate(run, 0, ONE)
    pretend_training(run, 0)
    evaluate(run, 1, ONE)
    assert [r.seed for r in images(run, 0)] == [r.seed for r in images(run, 1)]
    assert require_scores(run.path, 1)["policy_version"].startswith("0000-")


def test_replaced_weights_are_refused(tmp_path):
    run = open_made_run(tmp_path, "iterations=1")
    pretend_training(run, 0)
    evaluate(run, 1, ONE)
    manifest = run.stage_folder(0, "train") / "manifest.json"
    content = run.manifest(0, "train")
    manifest.unlink()
    content.extra["policy_sha256"] = "0" * 64
    run.commit(content)
    with pytest.raises(EvaluationError, match="0000-000000000000"):
        evaluate(run, 1, ONE)


def test_a_judge_without_a_number_is_an_error(tmp_path, monkeypatch):
    run = open_made_run(tmp_path)
    monkeypatch.setattr("tests.made_run.Painter.text_logps", broken_judge)
    with pytest.raises(EvaluationError, match="single_object-heldout-000_00"):
        evaluate(run, 0, ONE)


def broken_judge(self, images, questions, responses, end_of_turn=False):
    import torch

    from unified_rl.backbones.base import TextScore

    ids = torch.tensor([self.tokenizer.encode(r)[:1] for r in responses])
    return TextScore(torch.full(ids.shape, float("nan")), torch.ones(ids.shape), ids)


def test_prompts_without_a_detector_get_genevals_folder(tmp_path, monkeypatch):
    names = ("bench", "cow", "dog", "bus", "car")
    metadata = [{"tag": "single_object", "include": [{"class": name, "count": 1}]} for name in names]
    prompts = [
        PromptRecord(f"p{i}", f"a photo of a {n}", m) for i, (n, m) in enumerate(zip(names, metadata, strict=True))
    ]
    for prompt in prompts:
        monkeypatch.setitem(BY_PROMPT, prompt.text, {"include": [{"class": "circle", "count": 1}]})
    run = open_made_run(tmp_path, "evaluate.questions=0", heldout=prompts)
    evaluate(run, 0, ONE)
    scores = require_scores(run.path, 0)
    assert "overall" not in scores and "reward_mean" in scores
    geneval = evaluation_folder(run.path, 0) / "geneval"
    assert sorted(p.name for p in geneval.iterdir()) == [f"{i:05d}" for i in range(5)]
    for i, prompt in enumerate(prompts):
        place = geneval / f"{i:05d}"
        assert json.loads((place / "metadata.jsonl").read_text()) == {**prompt.metadata, "prompt": prompt.text}
        names = sorted(p.name for p in (place / "samples").iterdir())
        assert names == [f"{j:04d}.png" for j in range(4)]
        assert Image.open(place / "samples" / names[0]).size == (32, 32)


def test_no_evaluation_prompts_is_no_work(tmp_path):
    run = open_made_run(tmp_path, "evaluate.prompts=''")
    assert evaluate(run, 0, ONE) == EXIT_OK
    assert not (run.path / "evaluation").exists()


def test_summary_has_exactly_the_promised_fields(tmp_path, capsys):
    run = finish(open_made_run(tmp_path))
    (tmp_path / "setup").write_text("12.5\n")
    summary_main(["--run", str(run.path), "--setup-seconds-file", str(tmp_path / "setup")])
    summary = json.loads((run.path / "summary.json").read_text())
    assert set(summary) == {"base", "tuned", "reward", "loop_seconds", "setup_seconds", "iterations", "ranks"}
    names = {"overall", "single_object", "two_object", "counting", "colors", "position", "color_attr"}
    assert set(summary["base"]) == set(summary["tuned"]) == names | {"caption_ranking", "question_answering"}
    assert summary["tuned"]["overall"] > summary["base"]["overall"]
    assert summary["reward"]["last"] > summary["reward"]["first"]
    assert (summary["setup_seconds"], summary["iterations"], summary["ranks"]) == (12.5, 2, 2)
    assert summary["loop_seconds"] > 0
    printed = capsys.readouterr().out
    for word in ("drawing, overall", "95 %", "before_after.png", "report.html", "tensorboard"):
        assert word in printed


def test_comparison_names_what_is_missing(tmp_path):
    run = open_made_run(tmp_path)
    with pytest.raises(EvaluationError, match="--iteration 0"):
        compare(run.path)
    evaluate(run, 0, ONE)
    with pytest.raises(EvaluationError, match="--iteration 2"):
        compare(run.path)


def test_columns_of_the_table_are_aligned(tmp_path):
    run = finish(open_made_run(tmp_path))
    lines = table(compare(run.path), {"mean": 0.01, "low": -0.02, "high": 0.04}).splitlines()
    ends = {tuple(m.start() for m in re.finditer(r"\.\.", line.split(" (")[0])) for line in lines[1:]}
    assert len(ends) == 1 and len(ends.pop()) == 3
    assert lines[1].endswith("+0.010 (-0.020 .. +0.040)")


def test_the_table_is_printed_when_base_and_trained_weights_are_evaluated(tmp_path, capsys):
    run = open_made_run(tmp_path, "iterations=1")
    evaluate(run, 0, ONE)
    assert capsys.readouterr().out == ""
    pretend_training(run, 0)
    evaluate(run, 1, ONE)
    printed = capsys.readouterr().out
    assert "drawing, overall" in printed and "color attr" in printed
    evaluate(run, 1, ONE)  # already committed
    assert capsys.readouterr().out == printed


def test_evidence_over_seeds(tmp_path):
    folders = {}
    for kind in ("main", "shuffled"):
        for seed in (1, 2):
            control = "policy.control=" + ("none" if kind == "main" else kind)
            run = open_made_run(tmp_path / f"{kind}{seed}", "iterations=1", f"seed={seed}", control)
            folders[kind, seed] = finish(run).path
    out = tmp_path / "out"
    out.mkdir()
    for (kind, seed), folder in folders.items():
        if (kind, seed) != ("shuffled", 2):
            (out / f"{kind}-{seed}").symlink_to(folder)
    with pytest.raises(EvaluationError, match="shuffled-2"):
        evidence(out, "gvu", "janus", 2, 2)
    (out / "shuffled-2").symlink_to(folders["main", 2])
    with pytest.raises(EvaluationError, match="shuffled-2 has policy.control=none, expected shuffled"):
        evidence(out, "gvu", "janus", 2, 2)
    (out / "shuffled-2").unlink()
    (out / "shuffled-2").symlink_to(folders["shuffled", 2])
    result = evidence(out, "gvu", "janus", 2, 2)
    gains = [
        require_scores(folders["main", s], 1)["overall"] - require_scores(folders["main", s], 0)["overall"]
        for s in (1, 2)
    ]
    assert result["gain"]["per_seed"] == pytest.approx(gains)
    assert result["gain"]["low"] <= result["gain"]["mean"] <= result["gain"]["high"]
    assert set(result["controls"]["shuffled"]) == {"mean", "low", "high", "per_seed"}
    assert result["understanding_change"]["caption_ranking"]["mean"] == 0


def test_timings_survive_a_cut_line_and_count_a_stage_once(tmp_path):
    append_timing(tmp_path, "rollout", 0, 2.0)
    append_timing(tmp_path, "rollout", 0, 3.0)
    append_timing(tmp_path, "train", 0, 5.0)
    append_timing(tmp_path, "rollout", 1, 1.0)
    with open(tmp_path / "timings.jsonl", "a") as file:
        file.write('{"stage": "tra')
    assert read_timings(tmp_path)["rollout", 0] == 3.0
    assert seconds_by_stage(tmp_path) == {"rollout": 4.0, "train": 5.0}
