"""SRUM's judge with scripted replies: what is asked, what is asked again, what becomes of the answers."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from unified_rl.backbones.base import TextTraj
from unified_rl.config import SrumConfig
from unified_rl.config_checks import CHOICES
from unified_rl.records import RewardRecord
from unified_rl.reward import srum
from unified_rl.reward.regions import REGION_RULES, Region, RegionError
from unified_rl.reward.reward_map import MAP_RULES
from unified_rl.reward.srum import SrumJudge, attempt_seed, record_fields
from unified_rl.reward.srum_parse import JudgeScore, ParseFailure
from unified_rl.reward.srum_prompts import THINK_INSTRUCTION, WORDINGS, global_question, local_question

END = 7
BRIEF = SrumConfig(grid_rows=1, grid_columns=2, wording="brief", max_new_tokens_global=50, max_new_tokens_local=60)


class Tokenizer:
    eos_token_id = END


class Scripted:
    """Judge that answers from a script: (question, attempt) -> reply, or a pair of reply and how it ended.

    `calls` records every batch that it was asked.
    """

    tokenizer = Tokenizer()

    def __init__(self, script):
        self.script = script
        self.asked = {}
        self.calls = []

    def rollout_text(self, images, questions, seeds, max_new_tokens, temperature, system=""):
        self.calls.append(
            {"images": images, "questions": questions, "seeds": seeds, "max_new_tokens": max_new_tokens,
             "temperature": temperature, "system": system}
        )  # fmt: skip
        replies = []
        for image, question in zip(images, questions, strict=True):
            key = (int(image[0, 0, 0]), question)
            attempt = self.asked[key] = self.asked.get(key, -1) + 1
            replies.append(self.script(*key, attempt))
        replies = [reply if isinstance(reply, tuple) else (reply, "ended") for reply in replies]
        lengths = {"ended": 3, "ended at the limit": max_new_tokens, "cut": max_new_tokens}
        ids, mask = torch.full((len(replies), max_new_tokens), END), torch.zeros(len(replies), max_new_tokens)
        for row, (_, how) in enumerate(replies):
            mask[row, : lengths[how]] = 1
            ids[row, : lengths[how] - (how != "cut")] = 1
        blank = torch.zeros(mask.shape)
        return TextTraj(ids, blank, blank, mask, [text for text, _ in replies])


def picture(name, height=16, width=32):
    """An image whose first byte is its name."""
    image = np.zeros((height, width, 3), np.uint8)
    image[0, 0, 0] = name
    return image


def always(whole="Score: 0.5", *parts):
    """The same answers to every image; `parts` are the scores of regions."""
    local = "\n".join(f"Region {i}\nObject: thing {i}\nScore: {s}" for i, s in enumerate(parts or ("1.0", "-0.5"), 1))
    return lambda name, question, attempt: whole if question.startswith("score the layout") else local


def judged(script, settings=BRIEF, images=None, grid=(1, 2), seeds=None):
    judge = Scripted(script)
    images = images or [picture(0)]
    count = range(len(images))
    scores = SrumJudge(judge, settings, grid).score(
        images, [f"prompt {i}" for i in count], [f"p{i}" for i in count], seeds or [100 + i for i in count]
    )
    return scores, judge


def is_local(question):
    return question.startswith("score the regions")


# From replies to a map


def test_replies_become_a_map():
    (score,), judge = judged(always())
    assert (score.status, score.reason) == ("ok", "")
    assert score.boxes == [(0, 0, 16, 16), (16, 0, 32, 16)]
    assert score.region_scores == [JudgeScore(1.0, "thing 1"), JudgeScore(-0.5, "thing 2")]
    assert score.global_score == JudgeScore(0.5)
    assert score.reward_map.alpha == 0.75 and score.reward_map.local.tolist() == [[1.0, -0.5]]
    assert score.scalar == pytest.approx(0.75 * (1.0 - 0.5) / 2)
    assert score.attempts == {"global": 1, "local": 1}
    assert score.replies["global"] == "Score: 0.5" and score.replies["local"].startswith("Region 1")


def test_each_question_is_one_greedy_batch():
    images = [picture(i) for i in range(3)]
    _, judge = judged(always(), images=images)
    whole, local = judge.calls
    assert [whole["temperature"], local["temperature"]] == [0.0, 0.0]
    assert [whole["max_new_tokens"], local["max_new_tokens"]] == [50, 60]
    assert whole["questions"] == [global_question(f"prompt {i}", "brief") for i in range(3)]
    boxes = [(0, 0, 16, 16), (16, 0, 32, 16)]
    assert local["questions"] == [local_question(f"prompt {i}", boxes, 16, 32, wording="brief") for i in range(3)]
    assert all(a is b for a, b in zip(whole["images"], images, strict=True))
    assert len({*whole["seeds"], *local["seeds"]}) == 6
    assert whole["system"] == local["system"] == ""


def test_full_wording_reason_and_size_reach_the_judge():
    settings = SrumConfig(grid_rows=1, grid_columns=2, with_reason=False)
    images = [picture(0, 16, 32)]
    _, judge = judged(lambda name, question, attempt: "Score: 0", settings, images)
    assert judge.calls[0]["questions"] == [global_question("prompt 0")]
    assert judge.calls[1]["questions"] == [
        local_question("prompt 0", [(0, 0, 16, 16), (16, 0, 32, 16)], 16, 32, with_reason=False)
    ]


def test_think_mode_gives_the_instruction_and_reads_behind_the_plan():
    def script(name, question, attempt):
        plan = "<think>Region 1\nScore: 0.9\nScore: 0.9</think>\n"
        return plan + ("Region 1\nScore: 0.1\nRegion 2\nScore: 0.2" if is_local(question) else "Score: 0.4")

    (score,), judge = judged(script, dataclasses.replace(BRIEF, think=True))
    assert {call["system"] for call in judge.calls} == {THINK_INSTRUCTION}
    assert [r.score for r in score.region_scores] == [0.1, 0.2] and score.global_score.score == 0.4
    _, judge = judged(script, dataclasses.replace(BRIEF, think=True, think_instruction="Plan."))
    assert {call["system"] for call in judge.calls} == {"Plan."}


def test_order_of_images_and_of_their_sizes_is_kept():
    def script(name, question, attempt):
        if not is_local(question):
            return f"Score: 0.{name}"
        return f"Region 1\nScore: -0.{name}\nRegion 2\nScore: 0.{name}"

    images = [picture(3, 8, 8), picture(1, 16, 32), picture(2, 4, 40)]
    scores, _ = judged(script, images=images, grid=(2, 4))
    assert [s.global_score.score for s in scores] == [0.3, 0.1, 0.2]
    assert [s.boxes[1] for s in scores] == [(4, 0, 8, 8), (16, 0, 32, 16), (20, 0, 40, 4)]
    for score, value in zip(scores, (0.3, 0.1, 0.2), strict=True):
        assert score.reward_map.local.tolist() == [pytest.approx([-value] * 2 + [value] * 2)] * 2


# What is asked again


def test_only_unread_replies_are_asked_again_with_new_seeds():
    def script(name, question, attempt):
        if is_local(question):
            return "Region 1\nScore: 0.1\nRegion 2\nScore: 0.2"
        return "no idea" if name == 1 and attempt < 2 else "Score: 0.5"

    scores, judge = judged(script, images=[picture(i) for i in range(3)])
    assert [len(call["questions"]) for call in judge.calls] == [3, 1, 1, 3]
    assert [call["temperature"] for call in judge.calls] == [0.0, 0.7, 0.7, 0.0]
    assert all(call["images"][0][0, 0, 0] == 1 for call in judge.calls[1:3])
    seeds = [seed for call in judge.calls for seed in call["seeds"]]
    assert len(set(seeds)) == len(seeds)
    assert seeds[1] == attempt_seed(101, "global", 0) and seeds[3] == attempt_seed(101, "global", 1)
    assert [s.attempts["global"] for s in scores] == [1, 3, 1]
    assert {s.status for s in scores} == {"ok"}


def test_regions_that_were_read_are_kept_and_the_missing_come_later():
    replies = ["Region 1\nScore: 0.1", "Region 1\nScore: 0.9", "Region 1\nScore: 0.8\nRegion 2\nScore: 0.2"]

    def script(name, question, attempt):
        return replies[attempt] if is_local(question) else "Score: 1.0"

    (score,), _ = judged(script)
    assert [r.score for r in score.region_scores] == [0.1, 0.2]
    assert score.attempts == {"global": 1, "local": 3} and score.status == "ok"


def test_a_region_that_stays_unread_is_not_painted():
    def script(name, question, attempt):
        return "Region 1\nScore: 1.0\nRegion 2\nScore: 8/10" if is_local(question) else "Score: 1.0"

    (score,), judge = judged(script, dataclasses.replace(BRIEF, retries=2))
    assert score.status == "ok" and score.attempts["local"] == 3
    assert isinstance(score.region_scores[1], ParseFailure) and "8/10" in score.region_scores[1].reason
    assert score.reward_map.local.tolist() == [[1.0, 0.0]]
    assert record_fields(score)["components"]["regions_failed"] == 1
    assert len(judge.calls) == 4


def test_no_retries():
    (score,), judge = judged(lambda *_: "hm", dataclasses.replace(BRIEF, retries=0))
    assert len(judge.calls) == 2 and score.attempts == {"global": 1, "local": 1}


@pytest.mark.parametrize(("how", "score"), [("ended", 0.5), ("ended at the limit", 0.5), ("cut", None)])
def test_a_number_at_the_end_of_a_reply_that_was_cut_off_is_not_read(how, score):
    settings = dataclasses.replace(BRIEF, retries=0, use_local=False)
    (result,), _ = judged(lambda *_: ("Score: 0.5", how), settings)
    assert (result.global_score.score if isinstance(result.global_score, JudgeScore) else None) == score
    if score is None:
        assert result.status == "failed" and "cut off inside the number" in result.reason


def test_results_do_not_depend_on_the_batch():
    def script(name, question, attempt):
        if attempt < name:
            return "Region 1\nScore: 0.3"  # no global score, and one region less
        return f"Region 1\nScore: 0.1\nRegion 2\nScore: 0.{name}" if is_local(question) else f"Score: 0.{name}"

    images, seeds = [picture(i) for i in range(4)], [5, 6, 7, 8]
    prompts, ids = [f"prompt {i}" for i in range(4)], list("abcd")
    together, scripted = [], []
    for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 3), slice(3, 4)]):
        judge, scores = Scripted(script), []
        for part in parts:
            scores += SrumJudge(judge, BRIEF, (1, 2)).score(images[part], prompts[part], ids[part], seeds[part])
        together.append([dataclasses.replace(s, reward_map=None) for s in scores])
        asked = [zip(c["questions"], c["seeds"], strict=True) for c in judge.calls]
        scripted.append(sorted(pair for pairs in asked for pair in pairs))
    assert together[0] == together[1] and scripted[0] == scripted[1]


def test_attempt_seeds():
    seeds = [attempt_seed(s, q, a) for s in (1, 2**63 - 1) for q in ("global", "local") for a in range(3)]
    assert len(set(seeds)) == 12 and all(0 <= s < 2**63 for s in seeds)
    assert attempt_seed(1, "global", 0) == attempt_seed(1, "global", 0)


# Failures and presets


def test_an_unread_global_score_fails_the_image():
    (score,), _ = judged(always(whole="Overall it is great."))
    assert score.status == "failed" and score.reward_map is None and math.isnan(score.scalar)
    assert score.reason.startswith("global score: the reply holds no score (after 5 attempts; the last reply ends ")
    assert "Overall it is great." in score.reason
    assert [r.score for r in score.region_scores] == [1.0, -0.5]


def test_no_readable_region_fails_the_image():
    (score,), _ = judged(always("Score: 0.5", "2.0", "3.0"), dataclasses.replace(BRIEF, retries=0))
    assert score.status == "failed" and score.reason.startswith("regions: ")
    assert "outside -1..1 (after 1 attempt; " in score.reason


def test_a_failed_image_leaves_its_neighbours_alone():
    def script(name, question, attempt):
        return "?" if name == 1 else always()(name, question, attempt)

    scores, _ = judged(script, images=[picture(i) for i in range(3)])
    assert [s.status for s in scores] == ["ok", "failed", "ok"]
    alone, _ = judged(always(), images=[picture(0)])
    assert scores[0].reward_map.local.equal(alone[0].reward_map.local)


RELEASE = dataclasses.replace(BRIEF, preset="srum_release", retries=0)


@pytest.mark.parametrize(("whole", "reason"), [("Score: 0", "exactly 0"), ("hm", "the reply holds no score")])
def test_the_release_skips_neutral_and_missing_global_scores(whole, reason):
    (score,), _ = judged(always(whole), RELEASE)
    assert score.status == "skipped" and reason in score.reason and score.reward_map is None


def test_a_neutral_global_score_counts_in_the_paper():
    (score,), _ = judged(always("Score: 0.0"))
    assert score.status == "ok" and score.reward_map.alpha == 0.5


def test_the_release_paints_by_its_own_rules_and_goes_on_without_regions():
    (score,), _ = judged(always("Score: 0.5", "0.6", "-0.9"), RELEASE)
    assert score.reward_map.local.tolist() == [pytest.approx([0.8, 0.5])] and score.reward_map.alpha == 0.75
    (score,), _ = judged(lambda n, q, a: "hm" if is_local(q) else "Score: 0.5", RELEASE)
    assert score.status == "ok" and score.reward_map.local.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("preset", ["srum", "srum_release"])
def test_without_the_global_score(preset):
    settings = dataclasses.replace(BRIEF, preset=preset, use_global=False)
    (score,), judge = judged(always("Score: 0.5", "1.0", "0.5"), settings)
    assert all(is_local(q) for call in judge.calls for q in call["questions"])
    assert score.status == "ok" and score.global_score is None and score.reward_map.alpha == 1.0
    assert score.attempts == {"global": 0, "local": 1} and "global" not in score.replies
    assert "global_score" not in record_fields(score)["components"]


@pytest.mark.parametrize("preset", ["srum", "srum_release"])
def test_without_the_regions(preset):
    settings = dataclasses.replace(BRIEF, preset=preset, use_local=False)
    (score,), judge = judged(always("Score: 0.5"), settings, grid=(3, 2))
    assert not any(is_local(q) for call in judge.calls for q in call["questions"])
    assert score.status == "ok" and score.boxes == score.region_scores == []
    assert score.reward_map.local.tolist() == [[1.0, 1.0]] * 3 and score.scalar == 0.75


def test_without_either_the_map_is_one_and_nobody_is_asked():
    (score,), judge = judged(always(), dataclasses.replace(BRIEF, use_global=False, use_local=False))
    assert judge.calls == [] and score.status == "ok" and score.scalar == 1.0


# Regions


def test_an_image_without_proposals_is_background():
    """One colour all over: its only area is the whole image, which the filter takes away."""
    flat = np.full((16, 32, 3), 9, np.uint8)
    (score,), judge = judged(always(), dataclasses.replace(BRIEF, regions="components"), [flat])
    assert len(judge.calls) == 1 and score.status == "ok" and score.boxes == []
    assert score.reward_map.local.tolist() == [[0.0, 0.0]] and score.reward_map.alpha == 0.75


def test_components_are_filtered_and_asked_largest_first():
    image = np.full((16, 32, 3), 9, np.uint8)
    image[2:6, 2:6], image[8:14, 20:28] = 200, 120
    settings = dataclasses.replace(BRIEF, regions="components")
    (score,), judge = judged(always("Score: 1.0", "0.5", "-1.0"), settings, [image])
    assert score.boxes == [(20, 8, 28, 14), (2, 2, 6, 6)]
    assert "1 (20, 8, 28, 14) 2 (2, 2, 6, 6)" in judge.calls[1]["questions"][0]
    assert score.reward_map.local.flatten().tolist() == pytest.approx([-16 / 256, 0.5 * 48 / 256])


def test_all_cells_of_a_grid_are_judged():
    settings = dataclasses.replace(BRIEF, grid_rows=4, grid_columns=4)
    (score,), _ = judged(always("Score: 1.0", *["0.5"] * 16), settings, grid=(2, 2))
    assert len(score.boxes) == len(score.region_scores) == 16
    one = dataclasses.replace(BRIEF, grid_rows=1, grid_columns=1)
    assert judged(always("Score: 1.0", "0.5"), one)[0][0].boxes == [(0, 0, 32, 16)]


def file_settings(path, boxes):
    lines = [json.dumps({"prompt_id": p, "image_size": [160, 320], "boxes": b}) for p, b in boxes.items()]
    (path / "boxes.jsonl").write_text("\n".join(lines))
    return dataclasses.replace(BRIEF, regions="file", boxes_file=str(path / "boxes.jsonl"))


def test_boxes_of_a_file_are_rescaled(tmp_path):
    settings = file_settings(tmp_path, {"p0": [[0, 0, 160, 160]], "p1": [[160, 0, 320, 80], [0, 0, 10, 10]]})
    images = [picture(0, 16, 32), picture(1, 32, 64)]
    scores, judge = judged(always("Score: 1.0", "1.0"), settings, images)
    assert [s.boxes for s in scores] == [[(0, 0, 16, 16)], [(32, 0, 64, 16), (0, 0, 2, 2)]]
    assert scores[0].reward_map.local.tolist() == [[1.0, 0.0]]


def test_a_prompt_without_boxes_is_named(tmp_path):
    settings = file_settings(tmp_path, {"p0": [[0, 0, 160, 160]]})
    with pytest.raises(RegionError, match=r"boxes\.jsonl has no line for prompt p1"):
        judged(always(), settings, [picture(0), picture(1)])
    settings = file_settings(tmp_path, {"p0": [[0, 0, 160, 160]] * 257})
    with pytest.raises(RegionError, match="prompt p0 has more than 256 boxes"):
        judged(always(), settings)


def test_sam_proposes(monkeypatch):
    made = []

    class Proposer:
        def __init__(self, path, device):
            made.append((path, device))

        def __call__(self, image):
            return [Region((0, 0, 16, 16), 100), Region((16, 0, 32, 16), 200), Region((0, 0, 32, 16), 512)]

    monkeypatch.setattr("unified_rl.reward.sam.SamProposer", Proposer)
    settings = dataclasses.replace(BRIEF, regions="sam", sam_path="folder")
    (score,), _ = judged(always(), settings)
    assert score.boxes == [(16, 0, 32, 16), (0, 0, 16, 16)]  # by area; the whole image is filtered away
    (score,), _ = judged(always("Score: 1.0", "1", "1", "1"), dataclasses.replace(settings, preset="srum_release"))
    assert score.boxes[0] == (0, 0, 32, 16) and len(score.boxes) == 3
    assert made == [("folder", "cpu")] * 2
    judged(always(), dataclasses.replace(settings, use_local=False))
    assert len(made) == 2  # not loaded where no region is asked for


# Records


def record_of(score):
    record = RewardRecord(key="p_00", prompt_id="p", policy_version="base", **record_fields(score))
    return RewardRecord.from_members("p_00", record.to_members(), "s.tar")


def test_a_record_holds_map_regions_and_components():
    def script(name, question, attempt):
        return "Region 1\nObject: cup\nScore: -0.6\nReason: bent" if is_local(question) else "Score: 0.5"

    (score,), _ = judged(script)
    record = record_of(score)
    assert record.status == "ok" and record.reward == pytest.approx(0.75 * -0.3)
    assert record.components == pytest.approx(
        {"regions_read": 1, "regions_failed": 1, "attempts_global": 1, "attempts_local": 5, "global_score": 0.5,
         "region_score_mean": -0.6, "alpha": 0.75, "map_mean": -0.3, "map_min": -0.6, "map_max": 0.0,
         "map_negative_share": 0.5}
    )  # fmt: skip
    assert record.tensors["reward_map"].tolist() == [pytest.approx([-0.6, 0.0])]
    assert record.regions == [
        {"box": [0, 0, 16, 16], "score": -0.6, "object": "cup", "reason": "bent"},
        {"box": [16, 0, 32, 16], "score": None, "object": "", "reason": "the reply holds no score for region 2"},
    ]


@pytest.mark.parametrize(("settings", "status"), [(BRIEF, "failed"), (RELEASE, "skipped")])
def test_a_record_without_a_score_has_a_reason_and_no_number(settings, status):
    (score,), _ = judged(always("hm"), settings)
    record = record_of(score)
    assert (record.status, record.reward, record.tensors) == (status, None, {})
    assert "the reply holds no score" in record.reason and len(record.regions) == 2


def test_long_replies_are_kept_in_part():
    reason = "very " * 2000
    (score,), _ = judged(always(f"Score: 0.5\nReason: {reason}end"), BRIEF)
    assert len(score.replies["global"]) == srum.MAX_REPLY_CHARACTERS and score.replies["global"].endswith("end")
    (score,), _ = judged(
        lambda n, q, a: f"Region 1\nScore: 0\nReason: {reason}\nRegion 2\nScore: 0" if is_local(q) else "Score: 0.1"
    )
    assert len(record_of(score).regions[0]["reason"]) == 1000


def test_resampling_a_map_of_ones_stays_in_range():
    (score,), _ = judged(always("Score: 1.0", "1.0", "1.0"), grid=(3, 5), images=[picture(0, 7, 11)])
    assert record_of(score).tensors["reward_map"].max() <= 1.0


# Settings


def test_configuration_offers_what_there_is():
    assert CHOICES["reward.srum.preset"] == tuple(MAP_RULES) == tuple(REGION_RULES)
    assert CHOICES["reward.srum.wording"] == WORDINGS


def test_defaults_ask_as_often_and_as_long_as_the_release():
    settings = SrumConfig()
    assert (settings.retries + 1, settings.max_new_tokens_global, settings.max_new_tokens_local) == (5, 1024, 4096)


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="zip"):
        SrumJudge(Scripted(always()), BRIEF, (1, 2)).score([picture(0)], ["a", "b"], ["a"], [1])


# A real backbone


def test_random_replies_fail_with_a_reason(random_janus_folder):
    """Random weights write no score, so every attempt ends without one."""
    from unified_rl.backbones.janus import JanusBackbone

    janus = JanusBackbone.from_pretrained(random_janus_folder)
    settings = SrumConfig(wording="brief", max_new_tokens_global=12, max_new_tokens_local=12, retries=2)
    images = [np.full((32, 32, 3), value, np.uint8) for value in (0, 90, 255)]
    about = (images, ["a red circle"] * 3, ["a", "b", "c"], [1, 2, 3])
    scores = SrumJudge(janus, settings, janus.grid).score(*about)
    for score in scores:
        assert score.status == "failed" and score.reason.startswith("global score: ") and score.reward_map is None
        assert score.attempts == {"global": 3, "local": 3} and len(score.boxes) == 4
        assert record_of(score).reward is None
    again = SrumJudge(janus, settings, janus.grid).score(*[part[1:2] for part in about])
    assert again == scores[1:2]
