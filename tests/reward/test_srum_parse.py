"""The judge's replies: every shape that judges write is read, and no number is ever made up."""

import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unified_rl.reward.srum_parse import JudgeScore, ParseFailure, parse_global, parse_regions

# reply, score
GLOBAL_SCORES = [
    ("Score: 0.8\nReason: The cup is left of the plate.", 0.8),
    ("score: 0.8", 0.8),
    ("SCORE : 0.8", 0.8),
    ("Score = -0.25 (two birds instead of three)", -0.25),
    ("Score: 1", 1.0),
    ("Score: -1.0", -1.0),
    ("Score: 0", 0.0),
    ("Score: -0.0", 0.0),
    ("Score: +0.8", 0.8),
    ("Score: .5", 0.5),
    ("Score: -.5", -0.5),
    ("Score: +.5", 0.5),
    ("Score: 1.", 1.0),
    ("Score: 1e-1", 0.1),
    ("Score: \u22120.7", -0.7),  # minus sign
    ("Score: \u20130.7", -0.7),  # en dash
    ("Score：0.6", 0.6),  # full-width colon
    ("Score:\u00a00.6", 0.6),
    ("Score: - 0.4", -0.4),
    ("Score -0.8", -0.8),
    ("**Score:** 0.8", 0.8),
    ("**Score: 0.8**", 0.8),
    ("*Score*: **-0.5** – wrong side", -0.5),
    ("__Score__: `0.3`", 0.3),
    ("### Score: 0.3", 0.3),
    ("### Score\n0.3\n", 0.3),
    ("**Score**\n\n-1\n\n**Reason**\nall wrong", -1.0),
    ("> Score: 0.3", 0.3),
    ("- Score: 0.3\n- Reason: fine", 0.3),
    ("1. Score: 0.8\n2. Reason: fine", 0.8),
    ("Reason: good enough.\nScore: 0.7", 0.7),
    ("Final Score: 0.7", 0.7),
    ("The overall layout score is 0.7.", 0.7),
    ("Score (from -1 to 1): 0.4", 0.4),
    ("Score: 0.4 on a scale from -1 to 1", 0.4),
    ("Score: 0.8/1.0", 0.8),
    ("Score: 0.8 out of 1", 0.8),
    ("Score: [0.4]", 0.4),
    ("Score: \\boxed{0.4}", 0.4),
    ("Score: $0.4$", 0.4),
    ("<score>0.4</score><reason>fine</reason>", 0.4),
    ("Score: 0.4<|im_end|>", 0.4),
    ("| Score | 0.4 |\n| Reason | fine |", 0.4),
    ("| Score | Reason |\n|---|---|\n| 0.4 | fine |", 0.4),
    ('{"score": 0.4, "reason": "a brace } and a \\"score\\": 0.9"}', 0.4),
    ('```json\n{"score": "-0.4"}\n```', -0.4),
    ("{'score': 0.4, 'reason': 'fine'}", 0.4),
    ('Here you are: {"global_layout_score": 0.4}. I hope this helps.', 0.4),
    ('{"score": 0.4, "reason": "cut of', 0.4),
    ("0.4", 0.4),
    ("**-0.4**", -0.4),
    ("Score: 0.5\n...\nScore: 0.5", 0.5),
    ("Score: <number>\nReason: <reason>\n\nScore: 0.5", 0.5),
    ("<think>Perhaps Score: 0.9? No.</think>\nScore: 0.4", 0.4),
    ("Perhaps Score: 0.9? No.</think>\n\nScore: 0.4", 0.4),
    ("<think>a</think>b Score: 0.9 <think>c</think> Score: 0.4", 0.4),
    ("<THINK>Score: 0.9</THINK >Score: 0.4", 0.4),
    ("Score: 0.4\n<think>Wait, Score: 0.9", 0.4),
]

# reply, what the reason says
GLOBAL_FAILURES = [
    ("", "empty"),
    (" \n\t", "empty"),
    ("I cannot judge this picture.", "no score"),
    ("Score:", "no number"),
    ("Score: \nReason: 0.8 of it is right", "no number"),
    ("Score: <number>", "no number"),
    ("Score: good", "no number"),
    ("Score: N/A", "no number"),
    ("Score: NaN", "no number"),
    ("Score: inf", "no number"),
    ("Score: ½", "no number"),
    ("Score: --0.5", "no number"),
    ("Score: between 0.5 and 0.7", "no number"),
    ("Score: null", "no number"),
    ('{"score": null}', "no number"),
    ('{"score": true}', "no number"),
    ('{"score": 1e999}', "no number"),
    ("Score:\n1. The picture", "no number"),
    ("Score: 1.01", "outside -1..1"),
    ("Score: -1.5", "outside -1..1"),
    ("Score: 8", "outside -1..1"),
    ("Score: " + "9" * 5000, "outside -1..1"),
    ('{"score": 7}', "outside -1..1"),
    ("Score: 8/10", "8/10"),
    ("Score: 0.8/10", "0.8/10"),
    ("Score: 1 of 5", "1 of 5"),
    ("Score: 1 out of 10", "1 out of 10"),
    ("Score: 1/100", "1/100"),
    ('{"score": "8/10"}', "8/10"),
    ("Score: 80%", "80%"),
    ("Score: 1 percent", "percent"),
    ("Score: 0,8", "0,8"),
    ("Score: 0.5 to 0.7", "0.5 to 0.7"),
    ("Score: 0.5-0.7", "0.5-0.7"),
    ("Score: 0.5..0.9", "0.5..0.9"),
    ("Score: 0.5 or 0.6", "0.5 or 0.6"),
    ("Score: 0.8 -> 0.6", "0.8 -> 0.6"),
    ("Score: 0.8±0.1", "0.8±0.1"),
    ("Score: 0.3+.5", "0.3+.5"),
    ("Score: [-1, 1]", "-1, 1"),
    ("Score: 0.8.1", "0.8.1"),
    ("Score: 0.8²", "0.8²"),
    ("Score: 0.3**2", "0.3 2"),
    ("Score: '0.3''2'", "0.3"),
    ("Score: 0.3<b>2</b>", "0.3 2"),
    ("Score: 1st place", "1st place"),
    ("Score: 1 000", "1 000"),
    ("Score: - 1 bird is missing", "negative number or a remark"),
    ("Score: 0.", "cut off inside the number"),
    ("Score: 0.5\nFinal score: 0.7", "different scores: 0.5, 0.7"),
    ("Score: 0.5\nScore: 8/10", "8/10"),
    ('{"score": 0.5, "score": 0.7}', "different scores"),
    ("Relevance score: 0.5\nQuality score: 0.6", "no score"),
    ("I would give a score of 0.9 if the cup were left.", "no score"),
    ("Score - 0.8", "no score"),  # a dash or a minus?
    ("<think>Score: 0.9", "plan was cut off"),
    ("<think>Score: 0.9</think>", "nothing follows the plan"),
    ("<think>Score: 0.9</think>\n\n", "nothing follows the plan"),
    ("Score: 0.9</think>", "nothing follows the plan"),
    ("<think>x</think><think>Score: 0.9", "plan was cut off"),
]

# reply, regions asked for, scores by region (None: a failure)
REGION_SCORES = [
    # plain blocks, however they are parted
    ("Region 1\nObject: horse\nScore: 0.8\n\nRegion 2\nObject: tree\nScore: -0.5", 2, [0.8, -0.5]),
    ("Region 1\nObject: horse\nScore: 0.8\n---\nRegion 2\nObject: tree\nScore: -0.5\n---\n", 2, [0.8, -0.5]),
    ("ID 1:\nObject: horse\nScore: 0.8\nID 2:\nObject: tree\nScore: -0.5", 2, [0.8, -0.5]),
    ("ID: 1\nObject: horse\nScore: .8\n***\nID: 2\nObject: tree\nScore: +.5", 2, [0.8, 0.5]),
    ("Region 1\n---\nObject: horse\n\nScore: 0.8\n===\nRegion 2\n\n\nScore: 0.1", 2, [0.8, 0.1]),
    ("Region 2\nScore: 0.2\nRegion 1\nScore: 0.1", 2, [0.1, 0.2]),
    ("Region 1: Object: dog, Score: 0.8. Region 2: Object: cat, Score: 0.5.", 2, [0.8, 0.5]),
    ("Region 1 | Object: dog | Score: 0.8\nRegion 2 | Object: cat | Score: 0.5", 2, [0.8, 0.5]),
    ("Region 1 score: 0.8\nRegion 2 score: 0.5", 2, [0.8, 0.5]),
    ("Score for region 1: 0.8\nScore for region 2: 0.5", 2, [0.8, 0.5]),
    ("Score (region 2): 0.8\nScore 1: 0.5", 2, [0.5, 0.8]),
    ("Score: 0.8 (Region 2)\nScore: 0.5 (Region 1)", 2, [0.5, 0.8]),
    ("Region 1: 0.8\nRegion 2: -0.3", 2, [0.8, -0.3]),
    ("Region 1 (0, 0, 16, 16): 0.8\nRegion 2: from (0, 0) to (9, 9): 0.3", 2, [0.8, 0.3]),
    ("Region 1\n0.8\n\nRegion 2\n\n-0.3", 2, [0.8, -0.3]),
    ("Region 1 (10, 20, 30, 40): dog\nScore: 0.3\nRegion 2 [1, 2, 3, 4]\nScore: 0.2", 2, [0.3, 0.2]),
    ("Region 1\nBox: [10, 20, 30, 40]\nScore: 0.3", 1, [0.3]),
    ("Region 1 — a dog. Score: 0.4\nRegion 2 shows a cat. Score: 0.2", 2, [0.4, 0.2]),
    ("Box #1: Score: 0.4\nBox #2: Score: 0.2", 2, [0.4, 0.2]),
    ("Object 1: 2 dogs\nScore: 0.4\nObject 2: cat\nScore: 0.2", 2, [0.4, 0.2]),
    # markdown, lists, tables, tags
    ("**Region 1**\n- **Object:** horse\n- **Score:** +0.8\n\n**Region 2**\n- **Score:** 0.1", 2, [0.8, 0.1]),
    ("### Region 1\n**Score**: **0.8**\n### Region 2\n**Score**: **0.1**", 2, [0.8, 0.1]),
    ("1. Object: dog\n   Score: 0.8\n2. Object: cat\n   Score: 0.1", 2, [0.8, 0.1]),
    ("1) dog: 0.8\n2) cat: 0.1", 2, [0.8, 0.1]),
    ("1. 0.8\n2. 0.1", 2, [0.8, 0.1]),
    ("1. dog: 0.8\n2. cat: cannot tell\n3. cow: 0.1", 3, [0.8, None, 0.1]),
    ("1. Score: 0.8\n2. Reason: fine", 2, [None, None]),
    ("[1] Score: 0.8\n[2] Score: 0.1", 2, [0.8, 0.1]),
    ("Region 2\n1. Object: dog\n2. Score: 0.8", 2, [None, 0.8]),
    ("1. Object: dog\n2. Score: 0.8", 1, [0.8]),
    ("| ID | Object | Score |\n|---|---|---|\n| 1 | dog | 0.8 |\n| 2 | cat | -0.4 |", 2, [0.8, -0.4]),
    ("Region | Score\n--- | ---\nRegion 1 | 0.8\nRegion 2 | -0.4", 2, [0.8, -0.4]),
    ("| Object | Score |\n|:--|--:|\n| dog | 0.8 |\n| cat | 0.4 |", 2, [0.8, 0.4]),
    ("| ID | Score |\n|---|---|\n| 2 | 0.8 |\n| 3 |", 3, [None, 0.8, None]),
    ("<region>1</region><object>d</object><score>0.8</score><region>2</region><score>0.2</score>", 2, [0.8, 0.2]),
    # JSON, whole and broken
    ('[{"id": 1, "object": "dog", "score": 0.8}, {"id": 2, "score": -1}]', 2, [0.8, -1.0]),
    (
        '```json\n{"regions": [{"region_id": 2, "score": "0.8"}, {"region_id": 1, "score": "8/10"}]}\n```',
        2,
        [None, 0.8],
    ),
    ('{"1": 0.8, "2": -0.5}', 2, [0.8, -0.5]),
    ('{"Region 1": {"Object": "dog", "Score": 0.8}, "Region 2": {"Score": 0.5}}', 2, [0.8, 0.5]),
    ('{"id": 1, "score": 0.8}\n{"id": 2, "score": 0.5}', 2, [0.8, 0.5]),
    ('[{"score": 0.8}, {"score": 0.5}]', 2, [0.8, 0.5]),
    ('{"scores": [0.8, 0.5]}', 2, [0.8, 0.5]),
    ('Scores [all]: [{"id": 1, "score": 0.8}, {"id": 2, "score": 0.5}]', 2, [0.8, 0.5]),
    ('[{"id": 1, "score": 0.8,}, {"id": 2, "score": 0.5,},]', 2, [0.8, 0.5]),
    ("[{'id': 1, 'score': 0.8}, {'id': 2, 'score': 0.5}]", 2, [0.8, 0.5]),
    ('[{"score": 0.8, "id": 1}, {"score": 0.5, "id": 2}, {"sco', 3, [0.8, 0.5, None]),
    ('{"1": {"score": 0.8}, "2": {"object": "dog", "sc', 2, [0.8, None]),
    ('{"1": 0.8, "2": 0.5, "3": -0.', 3, [0.8, 0.5, None]),
    # plans
    ("<think>Region 1: Score: 0.9\nRegion 2: Score: 0.9</think>\nRegion 1\nScore: 0.1", 2, [0.1, None]),
    ("<think>Region 1: Score: 0.9\n\nRegion 2", 2, [None, None]),
    ("Region 1: Score: 0.9</think>", 1, [None]),
    ("", 2, [None, None]),
    # numbers that are missing, and order in their place
    ("Object: dog\nScore: 0.1\nObject: cat\nScore: 0.2", 2, [0.1, 0.2]),
    ("Object: dog\nScore: 0.1\n\nObject: cat\nScore: 0.2\n\n", 2, [0.1, 0.2]),
    ("Score: .1\nScore: .2\nScore: .3", 3, [0.1, 0.2, 0.3]),
    ("Object: dog\nScore: 0.1\n\nObject: cat\nScore: 0.2", 3, [None, None, None]),
    ("Score: .1\nScore: .2\nScore: .3", 2, [None, None]),
    ("Score: 0.1", 1, [0.1]),
    ("0.1", 1, [0.1]),
    ("Region 1\nScore: 0.1\n---\nObject: cat\nScore: 0.2\n---\nRegion 3\nScore: 0.3", 3, [0.1, 0.2, 0.3]),
    ("Region 1\nScore: 0.1\n---\nObject: cat\nScore: 0.2", 3, [0.1, None, None]),
    ("Region 1\nObject: dog\nScore: 0.1\nRegion 3\nObject: cat\nScore: 0.3", 3, [0.1, None, 0.3]),
    ("Region 0\nScore: 0.1\nRegion 1\nScore: 0.2", 2, [0.1, 0.2]),
    ("Region 0\nScore: 0.1\nRegion 1\nScore: 0.2", 3, [None, None, None]),
    ("Region 1\nScore: 0.1\nRegion 7\nScore: 0.7", 2, [0.1, None]),
    ("Regions 1, 2 and 3: Score: 0.8", 3, [None, None, None]),
    ("Region 1\nScore: 0.1\nRegions 2-3\nScore: 0.5", 3, [0.1, None, None]),
    ("Score: 0.8\nRegion 1\n\nScore: 0.5\nRegion 2", 2, [None, None]),  # a number before or behind its score?
    ("Overall score: 0.7\nRegion 1\nScore: 0.1\nRegion 2\nScore: 0.2", 2, [0.1, 0.2]),
    # said twice
    ("Region 1\nScore: 0.1\nRegion 1\nScore: 0.1\nRegion 2\nScore: 0.3", 2, [0.1, 0.3]),
    ("Region 1\nScore: 0.1\nRegion 1\nScore: 0.2\nRegion 2\nScore: 0.3", 2, [None, 0.3]),
    ("Region 1\nScore: 0.1\nScore: 0.2\nRegion 2\nScore: 0.3", 2, [None, 0.3]),
    # one bad block does not spoil the others
    ("Region 1\nScore:\nRegion 2\nScore: 0.5", 2, [None, 0.5]),
    ("Region 1\nScore: 1.5\nRegion 2\nScore: 0.5", 2, [None, 0.5]),
    ("Region 1\nScore: 0.8\nRegion 2\nObject: do", 2, [0.8, None]),
    ("Region 1\nScore: 0.8\nRegion 2\nScore: 0.", 2, [0.8, None]),
    ("Region 1: cannot tell.\nRegion 2 shows a tree. Score: 0.5", 2, [None, 0.5]),
    ("Region 1\nScore: 0.8\nReason: region 2 is worse. Region 2 is dark.\nRegion 2\nScore: 0.1", 2, [0.8, 0.1]),
    # a region that is only mentioned begins no block
    (
        "Region 1\nScore: .8\nReason: good. Region 3, however, is bad.\n---\nObject: cat\nScore: -.5",
        3,
        [0.8, None, None],
    ),
    # numbered thoughts are no regions
    ("1. The picture is sharp.\n2. It is bright.\nScore: 0.8", 2, [None, None]),
    ("Region 1\nReason: 3 legs, and the score: 0.9 is too kind.\nScore: 0.8", 1, [0.8]),
    ("Region 1\nReason: 3 legs. The score: 0.9 would be kind.\nScore: 0.8", 1, [None]),  # which one counts?
]


def name(value):
    return re.sub(r"\W+", "_", value)[:40] if isinstance(value, str) else None


@pytest.mark.parametrize("reply, score", GLOBAL_SCORES, ids=name)
def test_a_global_score_is_read(reply, score):
    result = parse_global(reply)
    assert isinstance(result, JudgeScore), result
    assert result.score == score and str(result.score) == str(score)


@pytest.mark.parametrize("reply, reason", GLOBAL_FAILURES, ids=name)
def test_a_global_score_that_is_not_certain_fails_with_its_reason(reply, reason):
    result = parse_global(reply)
    assert isinstance(result, ParseFailure), result
    assert reason in result.reason and len(result.reason) < 200


@pytest.mark.parametrize("reply, count, scores", REGION_SCORES, ids=name)
def test_regions(reply, count, scores):
    results = parse_regions(reply, count)
    assert list(results) == list(range(1, count + 1))
    assert [r.score if isinstance(r, JudgeScore) else None for r in results.values()] == scores
    assert all(r.reason for r in results.values() if isinstance(r, ParseFailure))


@pytest.mark.parametrize(
    "reply, count, region, reason",
    [
        ("Region 1\nScore: 0.1", 2, 2, "no score for region 2"),
        ("Region 1\nScore: 1.5", 1, 1, "1.5 is outside -1..1"),
        ("Region 1\nScore: 0.1\nRegion 7\nScore: 0.2", 2, 2, "cannot be assigned to a region (region 7 of 2)"),
        ("Score: 0.1\nScore: 0.2", 3, 1, "2 of its scores cannot be assigned"),
        ("Region 0\nScore: 0.1\nRegion 1\nScore: 0.2", 3, 2, "numbers its regions from 0"),
        ("Score: 0.8\nRegion 1\n\nScore: 0.5\nRegion 2", 2, 1, "before any region's number"),
        ("Region 1\nScore: 0.1\nScore: 0.2", 1, 1, "different scores: 0.1, 0.2"),
        ("<think>Region 1", 1, 1, "plan was cut off"),
    ],
)
def test_the_reason_of_a_region_says_what_is_wrong(reply, count, region, reason):
    assert reason in parse_regions(reply, count)[region].reason


def test_what_the_judge_says_is_kept():
    reply = "**Region 1**\n**Object:** a horse's head\n**Score:** 0.8\n**Reason:** sharp, and asked for.\n\n"
    results = parse_regions(f"{reply}Region 2\nScore: 0", 2)
    assert results[1] == JudgeScore(0.8, "a horse's head", "sharp, and asked for.")
    assert results[2] == JudgeScore(0.0)
    assert parse_global("Score: 0.8\nReason: Left of it.").reason == "Left of it."
    assert parse_global('{"reason": "Left.", "score": 1}') == JudgeScore(1.0, reason="Left.")


@pytest.mark.parametrize("tail, score", [("Score: 0.8", None), ("Score: 0.8\n", None), ("Score: 0.8\nRea", 0.8)])
def test_a_number_where_the_reply_was_stopped_may_lack_digits(tail, score):
    result = parse_global(tail, truncated=True)
    assert (result.score if isinstance(result, JudgeScore) else None) == score
    regions = parse_regions(f"Region 1: 0.5\nRegion 2\n{tail}", 2, truncated=True)
    assert regions[1].score == 0.5
    assert (regions[2].score if isinstance(regions[2], JudgeScore) else None) == score


def test_half_a_character_in_json_can_be_written():
    assert parse_global('{"score": 0.5, "reason": "red \\ud83d"}') == JudgeScore(0.5, reason="red ?")


def test_an_image_without_regions():
    assert parse_regions("Score: 0.8", 0) == {}


STYLES = {
    "blank lines": lambda i, s: f"Region {i}\nObject: thing\nScore: {s}\nReason: because\n\n",
    "rulers": lambda i, s: f"ID {i}\nObject: thing\nScore: {s}\n---\n",
    "single lines": lambda i, s: f"Region {i}\nObject: thing\nScore: {s}\n",
    "markdown": lambda i, s: f"### **Region {i}**\n* **Object**: thing\n* **Score:** {s}\n\n",
    "one line each": lambda i, s: f"Region {i}: Object: thing; Score: {s}; Reason: because.\n",
    "list": lambda i, s: f"{i}. Object: thing\n   Score: {s}\n",
    "rows": lambda i, s: ("| ID | Object | Score |\n|--|--|--|\n" if i == 1 else "") + f"| {i} | thing | {s} |\n",
    "json lines": lambda i, s: json.dumps({"id": i, "object": "thing", "score": float(s)}) + "\n",
}
HUNDREDTHS = st.integers(-100, 100).map(lambda n: f"{n / 100:+.2f}" if n % 3 else f"{n / 100:g}")


@settings(deadline=None, max_examples=60)
@given(st.lists(HUNDREDTHS, min_size=1, max_size=12), st.sampled_from(sorted(STYLES)))
def test_nothing_is_lost_in_any_style(scores, style):
    reply = "".join(STYLES[style](i, s) for i, s in enumerate(scores, 1))
    results = parse_regions(f"<think>Region 1 Score: 0.123</think>\n{reply}", len(scores))
    assert [r.score for r in results.values()] == [float(s) for s in scores]


@settings(deadline=None, max_examples=60)
@given(st.lists(HUNDREDTHS, min_size=2, max_size=6), st.sampled_from(sorted(STYLES)), st.data())
def test_a_reply_cut_anywhere_gives_right_scores_or_none(scores, style, data):
    reply = "".join(STYLES[style](i, s) for i, s in enumerate(scores, 1))
    reply = reply[: data.draw(st.integers(0, len(reply)))]
    for region, result in parse_regions(reply, len(scores), truncated=True).items():
        assert isinstance(result, ParseFailure) or result.score == float(scores[region - 1])


SCRAPS = [
    *("Score", ":", " ", "\n", "Region 1", "Region 2", "---", "Object: ", "Reason: ", "<think>", "</think>", "<b>"),
    *("0.3", "-0.7", "1", "+.5", ",", "/10", "2.", "%", "to", '"id": ', '"score": ', "'", '"', "_"),
    *("**", "{", "}", "[", "]", "|", "(", ")", "```", "\\boxed{"),
]


@settings(deadline=None, max_examples=500)
@given(st.lists(st.sampled_from(SCRAPS), max_size=25), st.booleans())
def test_rubbish_never_raises_and_no_number_is_made_up(scraps, truncated):
    reply = "".join(scraps)
    digits = re.sub(r"[^0-9.+\-]+", " ", reply)
    results = [parse_global(reply, truncated), *parse_regions(reply, 2, truncated).values()]
    for score in (r.score for r in results if isinstance(r, JudgeScore)):
        stated = [float(n) for n in re.findall(r"(?=((?<![0-9.])[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)))", digits)]
        assert -1 <= score <= 1 and score in stated


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=80))
def test_any_text_is_survived(reply):
    parse_global(reply)
    parse_regions(reply, 3)


@pytest.mark.parametrize(
    "scrap", ["Score ", "region 1 ", " ", "[{", "1. ", "Score: 1 ", "| a ", "- ", "\n", "'a ", "<think"]
)
def test_a_judge_that_repeats_itself_for_pages_takes_no_time(scrap):
    reply = scrap * (20_000 // len(scrap))
    started = time.perf_counter()
    parse_regions(reply, 10)
    assert time.perf_counter() - started < 5  # quadratic expressions would take minutes


def test_deep_nesting_is_survived():
    for reply in ("[" * 20_000 + "]" * 20_000, '{"a":' * 900 + "1" + "}" * 900):
        assert isinstance(parse_global(reply), ParseFailure)
