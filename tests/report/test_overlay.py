"""Pictures of SRUM's judgements, alone and in the logs and page of a run."""

import re

import numpy as np
import pytest
import torch
from PIL import ImageDraw

from tests.made_run import BY_PROMPT, Painter, finish, open_made_run
from tests.report.test_report import Checker, events
from unified_rl.backbones.base import TextTraj
from unified_rl.records import RewardRecord
from unified_rl.report import overlay
from unified_rl.report.html import group_section, judged_section, render
from unified_rl.report.overlay import BAD, GAP, GOOD, HEAD, MARGIN, NEUTRAL, diverging, srum_overlay
from unified_rl.report.tensorboard import write_tensorboard
from unified_rl.report.truth import Group, Judged, Sample, first_shard, judged_ends, read_truth, srum_means
from unified_rl.shapes.world import CELL, detect, is_correct

CELLS = [(0, 0, 16, 16), (16, 0, 32, 16), (0, 16, 16, 32), (16, 16, 32, 32)]
SCORES = [1.0, 0.0, None, -1.0]
MAP = np.array([[1.0, 0.0], [0.0, -1.0]])


def picture(height=32, width=32):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def panel(shown, number, size=320):
    """Pixels of a panel, its border left out."""
    left, top = MARGIN + number * (size + GAP), MARGIN + HEAD
    return shown[top + 1 : top + size - 1, left + 1 : left + size - 1]


def test_left_is_the_image_enlarged_in_whole_steps():
    image = picture()
    shown = srum_overlay(image, CELLS, SCORES, MAP, 0.5)
    assert shown.dtype == np.uint8 and shown.shape[1] == 3 * 320 + 2 * GAP + 2 * MARGIN
    assert (panel(shown, 0) == image.repeat(10, 0).repeat(10, 1)[1:-1, 1:-1]).all()


def test_regions_are_framed_and_labelled_by_sign():
    shown = panel(srum_overlay(np.full((32, 32, 3), 90, np.uint8), CELLS, SCORES, MAP, 1.0), 1)
    good, bad = ((shown == colour).all(-1) for colour in (GOOD, BAD))
    assert good[:160, :160].sum() > 1000 and good[160:].sum() == 0 and good[:, 160:].sum() == 0
    assert bad[160:, 160:].sum() > 1000 and bad[:159].sum() == 0 and bad[:, :159].sum() == 0
    unread, whole = ((shown[160:, :159] == overlay.UNREAD).all(-1), (shown[:159, 160:] == overlay.UNREAD).all(-1))
    assert 0 < unread[-2].sum() < 0.7 * whole[-3].sum()  # dashed: only parts of the lower edge have the colour


def test_the_map_attracts_in_blue_and_repels_in_orange():
    shown = panel(srum_overlay(np.full((32, 32, 3), 90, np.uint8), CELLS, SCORES, MAP, 1.0), 2)
    corner = {name: shown[row, column].astype(int) for name, row, column in (
        ("good", 10, 10), ("none", 10, 300), ("bad", 300, 300)
    )}  # fmt: skip
    assert corner["good"][2] > corner["good"][0] + 80 and corner["bad"][0] > corner["bad"][2] + 80
    assert np.ptp(corner["none"]) == 0
    half = panel(srum_overlay(np.full((32, 32, 3), 90, np.uint8), CELLS, SCORES, MAP, 0.2), 2)[10, 10].astype(int)
    assert half[0] > corner["good"][0] + 40  # alpha fades the colour


def test_without_a_map_there_are_two_panels():
    shown = srum_overlay(picture(), CELLS, SCORES, None, None)
    assert shown.shape[1] == 2 * 320 + GAP + 2 * MARGIN
    with pytest.raises(ValueError, match="4 boxes with 3 scores"):
        srum_overlay(picture(), CELLS, SCORES[:3], MAP, 1.0)
    with pytest.raises(ValueError, match="alpha"):
        srum_overlay(picture(), CELLS, SCORES, MAP, None)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (1024, 768), (700, 9)])
def test_any_size_and_any_grid(size):
    boxes = [(0, 0, size[1], size[0]), (0, 0, 1, 1), (size[1] - 1, size[0] - 1, size[1], size[0])]
    shown = srum_overlay(picture(*size), boxes, [0.3, None, -0.2], np.zeros((17, 5)), 1.0)
    assert shown.shape[2] == 3 and max(shown.shape) < 1200
    assert srum_overlay(picture(*size), [], [], np.ones((1, 1)), 1.0).shape == shown.shape


def test_colours_of_rewards():
    assert (diverging(0.0), diverging(1.0), diverging(-1.0)) == (NEUTRAL, GOOD, BAD)
    blues = [diverging(v / 10) for v in range(11)]
    assert all(a[0] > b[0] for a, b in zip(blues, blues[1:], strict=False))
    assert diverging(1.5) == GOOD


def test_labels_do_not_hide_each_other():
    draw = ImageDraw.Draw(overlay.Image.new("RGB", (320, 320)))
    taken = []
    for i in range(8):
        taken.append(overlay.draw_tag(draw, (10, 10, 310, 310), f"{i}: +0.50", GOOD, taken, (320, 320)))
    assert not any(overlay._meet(a, b) for i, a in enumerate(taken) for b in taken[:i])
    edge = overlay.draw_tag(draw, (318, 318, 319, 319), "9: ?", GOOD, [], (320, 320))
    assert edge[2] <= 320 and edge[3] <= 320


# In a run


class Watcher(Painter):
    """A painter that judges by the exact detector; the region at the lower left it never scores."""

    grid = (2, 2)

    def __init__(self, skill):
        super().__init__(skill)
        self.tokenizer.eos_token_id = -1

    def rollout_text(self, images, questions, seeds, max_new_tokens, temperature, system=""):
        texts = [self.answer(image, question) for image, question in zip(images, questions, strict=True)]
        blank = torch.zeros(len(images), 1)
        return TextTraj(blank.long(), blank, blank, blank + 1, texts)

    def answer(self, image, question):
        prompt = re.search('"(.*)"', question)
        if not prompt:
            return "yes"
        if question.startswith("score the layout"):
            return f"Score: {0.9 if is_correct(image, BY_PROMPT[prompt[1]]) else -0.4}"
        found = {d.row * 2 + d.column: d for d in detect(image)}
        lines = []
        for cell in range(4):
            thing = found.get(cell)
            name = f"{thing.color} {thing.shape}" if thing else "<background>"
            fits = sum(word in prompt[1] for word in name.split())
            score = (-0.8, 0.1, 0.9)[fits] if thing else 0.0
            lines.append(f"Region {cell + 1}\nObject: {name}\nScore: {'none' if cell == 2 else score}")
        return "\n".join(lines)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for place in ("unified_rl.reward.judges.load_backbone", "unified_rl.backbones.load.load_backbone"):
            patch.setattr(place, lambda *arguments, **named: Watcher(0.4))
        settings = ["method=srum", "srum.wording=brief", "srum.retries=1"]
        made = open_made_run(
            tmp_path_factory.mktemp("srum"), *[f"reward.{s}" for s in settings], "policy.objective=reward_weighted"
        )
        return finish(made)


def test_logs_show_overlays_and_means(run):
    logs = events(write_tensorboard(read_truth(run.path)))
    assert [e.step for e in logs.Images("srum/best")] == [e.step for e in logs.Images("srum/worst")] == [0, 1]
    assert not any(tag.startswith("group/") for tag in logs.Tags()["images"])
    for iteration in (0, 1):
        rewards = list(first_shard(read_truth(run.path), iteration)[1].values())
        scores = [r.components["global_score"] for r in rewards]
        assert logs.Scalars("srum/global_score")[iteration].value == pytest.approx(np.mean(scores))
        shares = [(r.tensors["reward_map"] < 0).float().mean() for r in rewards]
        assert logs.Scalars("srum/negative_share")[iteration].value == pytest.approx(np.mean(shares))
        assert logs.Scalars("srum/unread_region_share")[iteration].value == 0.25
        assert logs.Scalars("srum/failed_share")[iteration].value == 0
        assert logs.Scalars("srum/attempts_local")[iteration].value == 2
        assert logs.Scalars("srum/attempts_global")[iteration].value == 1


def test_page_shows_the_last_iterations_regions(run):
    page = render(read_truth(run.path))
    checker = Checker()
    checker.feed(page)
    assert checker.problems == [] and checker.open == []
    part = re.search("<h2>Regions, seen by the judge</h2>.*?</section>", page, re.DOTALL)[0]
    assert part.count("<article") == 8 and "Iteration 1:" in part
    assert "Highest reward" in part and "Lowest reward" in part and "not read" in part
    assert "<h2>One group" not in page  # images with maps of their own are not compared
    assert "Likelihood of held-out prompts" in page and page.count("Judge&#x27;s reward") == 2  # title and description


def test_best_and_worst_are_the_ends_and_apart(run):
    rollouts, rewards = first_shard(read_truth(run.path), 0)
    best, worst = judged_ends(rollouts, rewards)
    of_prompt = {}
    for record in rewards.values():
        of_prompt.setdefault(record.prompt_id, []).append(record.reward)
    assert [j.score.reward for j in best] == sorted((max(v) for v in of_prompt.values()), reverse=True)[:4]
    assert [j.score.reward for j in worst] == sorted(min(v) for v in of_prompt.values())[:4]
    assert not {j.score.key for j in best} & {j.score.key for j in worst}
    alone = {key: rewards[key] for key in list(rewards)[:1]}
    best, worst = judged_ends(rollouts, alone)
    assert len(best) == 1 and worst == []
    assert judged_ends(rollouts, {}) == ([], [])


def test_groups_without_tokens_are_shown_without_them():
    """GRPO on the scalar of the maps compares images, but scores no tokens of the prompt."""
    samples = [Sample(picture(), 0.5 - i, 1.0 - 2 * i, [], [], None) for i in range(2)]
    page = group_section(Group(0, "a cup", samples))
    assert "advantage +1.00" in page and "coloured by how probable" not in page and 'class="tok' not in page


def score_of(**changes):
    region = {"box": [0, 0, CELL, CELL], "score": 0.5, "object": "cup", "reason": ""}
    values = {
        "key": "p_00", "prompt_id": "p", "policy_version": "base", "status": "ok", "reward": 0.25,
        "components": {"alpha": 0.5}, "tensors": {"reward_map": torch.ones(1, 1)}, "regions": [region], **changes,
    }  # fmt: skip
    return RewardRecord(**values)


def test_means_count_failures_and_other_methods_have_none():
    failed = score_of(status="failed", reward=None, reason="unread", tensors={}, components={}, regions=[])
    means = srum_means({"a": score_of(), "b": failed})
    assert means == {"srum/failed_share": 0.5, "srum/alpha": 0.5, "srum/unread_region_share": 0.0}
    likelihood = score_of(tokens=["a"], tensors={"token_log_probs": torch.zeros(1)}, regions=[], components={})
    assert srum_means({"a": likelihood}) == srum_means({}) == {}


def test_text_of_the_judge_is_escaped_and_long_lists_are_cut():
    attack = '<img src=x onerror="alert(1)">'
    region = {"box": [0, 0, 4, 4], "score": None, "object": attack, "reason": attack}
    judged = Judged(picture(), attack, None, score_of(regions=[region] * 15))
    page = judged_section(3, [judged], [])
    checker = Checker()
    checker.feed(page)
    assert checker.problems == [] and page.count("<img") == 1 and "&lt;img src=x" in page
    assert page.count("<li>") == 12 and "and 3 regions more" in page and "Lowest reward" not in page
    assert judged_section(3, [], []) == ""
