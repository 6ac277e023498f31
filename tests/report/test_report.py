"""TensorBoard logs, pictures and the HTML page of a finished run."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tests.made_run import finish, open_made_run, use_painter
from unified_rl.report import figures, html_parts
from unified_rl.report.__main__ import main as report_main
from unified_rl.report.html import render
from unified_rl.report.tensorboard import write_tensorboard
from unified_rl.report.truth import first_shard, read_truth, spread, widest_group


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        use_painter(patch)
        return finish(open_made_run(tmp_path_factory.mktemp("made")))


@pytest.fixture(scope="module")
def page(run):
    return render(read_truth(run.path))


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def test_rebuilding_the_logs_does_not_double_points(run):
    truth = read_truth(run.path)
    write_tensorboard(truth)
    folder = write_tensorboard(truth)
    assert len(list(folder.iterdir())) == 1
    logs = events(folder)
    assert [e.step for e in logs.Scalars("kl")] == list(range(1, 9))
    assert [e.value for e in logs.Scalars("kl")] == pytest.approx([0.001 * i for i in range(8)])
    expected = [run.require_manifest(k, "reward").extra["reward_mean"] for k in (0, 1)]
    assert [e.value for e in logs.Scalars("iteration/reward_mean")] == pytest.approx(expected)
    assert [e.step for e in logs.Scalars("eval/overall")] == [0, 2]
    assert [e.value for e in logs.Scalars("iteration/zero_std_share")] == [0.125, 0.125]
    for tag in ("evaluation/fixed_prompts", "group/by_advantage", "group/token_likelihood"):
        assert logs.Images(tag)


def test_a_watching_tensorboard_drops_the_points_of_the_replaced_file(run):
    """Both files lie in the folder for a moment, and for ever when a kill falls between them."""
    truth = read_truth(run.path)
    folder = write_tensorboard(truth)
    old = next(folder.iterdir())
    data = old.read_bytes()
    write_tensorboard(truth)
    (folder / "events.out.tfevents.0000000000.old").write_bytes(data)
    assert [e.step for e in events(folder).Scalars("kl")] == list(range(1, 9))
    write_tensorboard(truth)


class Checker(HTMLParser):
    """Collects what a page must not or must have."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.problems = [], [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        if tag in ("script", "link", "iframe", "object"):
            self.problems.append(tag)
        if tag == "img" and not values.get("alt"):
            self.problems.append("img without alt")
        if tag == "th" and values.get("scope") not in ("col", "row"):
            self.problems.append("th without scope")
        for name, value in attributes:
            if name.startswith("on") or (name in ("src", "href") and not value.startswith("data:image/png;base64,")):
                self.problems.append(f"{name}={value}")
        if tag not in ("meta", "img", "line", "polyline", "circle", "rect", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"unbalanced {tag}")


def test_page_is_self_contained_and_well_formed(page):
    checker = Checker()
    checker.feed(page)
    assert checker.problems == [] and checker.open == []
    assert "url(" not in page and "@import" not in page
    assert not re.search(r"https?://", page)
    assert "default-src 'none'" in page


def test_page_shows_every_part(page):
    for heading in (
        "Before and after",
        "Pictures",
        "Learning",
        "One group",
        "Optimisation",
        "Work done",
        "Configuration",
    ):
        assert re.search(f"<h2>{heading}", page)
    for text in (
        "Judge&#x27;s reward",
        "Detector accuracy",
        "KL to the base policy",
        "Entropy",
        "Clip fraction",
        "Gradient",
    ):
        assert text in page
    assert "\u2713 correct" in page and "\u2717 wrong" in page


def test_text_of_prompts_is_escaped(run):
    truth = read_truth(run.path)
    attack = '<script>alert("x")</script>'
    for scores in truth.scores.values():
        for outcome in scores["prompts"].values():
            outcome["text"] = attack
    page = render(truth)
    assert "<script" not in page
    assert "&lt;script&gt;alert(&quot;x&quot;)" in page


def test_a_run_without_evaluation_still_has_a_page(tmp_path, monkeypatch):
    use_painter(monkeypatch)
    run = open_made_run(tmp_path)
    report_main(["--run", str(run.path)])
    assert "Not evaluated yet" in (run.path / "report.html").read_text()
    assert not (run.path / "before_after.png").exists()


def test_stored_control_is_shown(run, monkeypatch):
    interval = {"mean": 0.2, "low": 0.1, "high": 0.3, "per_seed": [0.1, 0.2, 0.3]}
    control = {"mean": 0.011, "low": -0.02, "high": 0.042, "per_seed": [0.0, 0.01, 0.02]}
    monkeypatch.setattr(
        "unified_rl.report.html.stored_evidence", lambda config: {"gain": interval, "controls": {"shuffled": control}}
    )
    assert "+0.011 (-0.020 .. +0.042)" in render(read_truth(run.path))


def test_stored_gain_in_answers_is_shown_beside_that_in_drawings(run, monkeypatch):
    def single(mean):
        return {"mean": mean, "low": None, "high": None, "per_seed": [mean]}

    evidence = {
        "gain": single(0.2), "controls": {"shuffled": single(0.011)},
        "understanding_gain": single(0.033), "understanding_controls": {"fixed_proposer": single(0.044)},
    }  # fmt: skip
    monkeypatch.setattr("unified_rl.report.html.stored_evidence", lambda config: evidence)
    page = render(read_truth(run.path))
    assert "change of sampled answers" in page and "Control: fixed proposer" in page
    assert "+0.033" in page and "+0.044" in page and "+0.011" in page


def test_group_view_is_sorted_by_advantage(run):
    truth = read_truth(run.path)
    rollouts, rewards = first_shard(truth, 0)
    group = widest_group(truth, 0, rollouts, rewards)
    values = [s.reward for s in group.samples]
    assert values == sorted(values, reverse=True)
    spread_of = [
        np.std([rewards[r.key].reward for r in rollouts if r.prompt.prompt_id == p])
        for p in {r.prompt.prompt_id for r in rollouts}
    ]
    assert np.std(values) == pytest.approx(max(spread_of))
    advantages = np.array([s.advantage for s in group.samples])
    assert advantages.mean() == pytest.approx(0, abs=1e-9) and advantages.std(ddof=1) == pytest.approx(1)


def test_before_and_after_picture(run):
    truth = read_truth(run.path)
    path = figures.write_before_after(truth)
    pairs = figures.picture_pairs(truth)
    assert len({p.prompt for p in pairs}) == len(pairs)
    shown = np.asarray(Image.open(path).convert("RGB"))
    enlarged = pairs[0].before.repeat(4, 0).repeat(4, 1)  # nearest neighbour, 32 -> 128 pixels
    assert (shown[118:246, 16:144] == enlarged).all()


def test_small_pictures_are_enlarged_in_whole_steps_and_large_ones_reduced():
    image = np.random.default_rng(0).integers(0, 255, (32, 24, 3), dtype=np.uint8)
    assert (np.asarray(figures.upscale(image, 100)) == image.repeat(3, 0).repeat(3, 1)).all()
    assert figures.upscale(np.zeros((384, 192, 3), np.uint8), 128).size == (64, 128)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.37, 0.41), (-3e-5, 9e-5), (2.0, 2.0), (0.0, 0.0), (1e6, 3e6)])
def test_ticks_span_the_values_evenly(low, high):
    made = html_parts.ticks(low, high)
    steps = np.diff(made)
    assert made[0] <= low and made[-1] >= high
    assert 2 <= len(made) <= 8
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_a_chart_with_one_point_or_none():
    assert html_parts.chart("t", "x", [html_parts.Series("a", [])]) == ""
    assert "<circle" in html_parts.chart("t", "x", [html_parts.Series("a", [(0.0, 1.0)])])


def test_long_lines_are_thinned_by_means():
    points = html_parts.thin([(float(i), float(i % 2)) for i in range(4000)])
    assert len(points) == 400
    assert {y for _, y in points} == {0.5}


def test_spread_keeps_the_ends():
    assert spread(list(range(100)), 5) == [0, 25, 50, 74, 99]
    assert spread([1, 2], 5) == [1, 2]


def test_token_line_colours_by_likelihood():
    line = html_parts.token_line([" red", "<b>"], [np.log(0.9), np.log(0.02)])
    assert '<span class="tok l0">red<small>0.90</small>' in line
    assert '<span class="tok l4">&lt;b&gt;<small>0.02</small>' in line


def test_logs_that_cannot_be_written_are_named(run):
    """The error comes from a thread of the writer, which knows no path and would print a traceback of its own."""
    script = (
        "import resource, signal, sys\n"
        "from unified_rl.report.tensorboard import write_tensorboard\n"
        "from unified_rl.report.truth import read_truth\n"
        "truth = read_truth(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n    write_tensorboard(truth)\n"
        "except OSError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(run.path)], capture_output=True, text=True, timeout=120)
    assert f"File too large: '{run.path / 'tensorboard'}'" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr
    write_tensorboard(read_truth(run.path))
    assert len(list((run.path / "tensorboard").iterdir())) == 1
