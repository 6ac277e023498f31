"""The Proposer's replies: every shape that models write is read, and nothing is made up."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unified_rl.reward.proposals import DrawingTask, ProposalRules, parse_drawing_task, parse_questions
from unified_rl.reward.skips import Skipped, SkipReason

HAT = "What colour is the hat?"

ONE_QUESTION = [
    f"Question: {HAT}",
    f"question : {HAT}",
    f"**Question:** {HAT}",
    f"**Question: {HAT}**",
    f"*Question:* {HAT}",
    f"__Question__: {HAT}",
    f"### Question:\n{HAT}",
    f"- Question: {HAT}",
    f"1. Question: {HAT}",
    f"Question 1: {HAT}",
    f"Q1: {HAT}",
    f"Q1. {HAT}",
    f"Q: {HAT}\nA: blue",
    f"Question: {HAT} Answer: blue",
    f"Question: {HAT}\nAnswer: blue",
    f'Question: "{HAT}"',
    f"Question:\n\n{HAT}",
    f"Sure, here you are.\n\nQuestion: {HAT}\n\nI hope this helps.",
    f"<question>{HAT}</question>",
    f"<question>\n{HAT}\n</question>\n<expected>blue</expected>",
    f'{{"question": "{HAT}", "answer": "blue"}}',
    f'```json\n{{\n  "question": "{HAT}"\n}}\n```',
    HAT,
    f"1. {HAT}",
    f"- {HAT}\n",
    "Question: What colour\nis the hat?\nI hope this helps",
    f"{HAT}<|im_end|>",
    f"<think>Question: How many?\nToo easy.</think>\nQuestion: {HAT}",
    f"Question: {HAT}\nQuestion: {HAT}",
]


@pytest.mark.parametrize("reply", ONE_QUESTION)
def test_a_question_is_read(reply):
    assert parse_questions(reply) == [HAT]
    assert parse_questions(reply, truncated=True) == [HAT]


@pytest.mark.parametrize(
    "reply, truncated, reason",
    [
        ("", False, SkipReason.EMPTY_REPLY),
        ("<think>Question: What is it?", True, SkipReason.NO_QUESTION),
        ("I see a man with a hat.", False, SkipReason.NO_QUESTION),
        ("Question:", False, SkipReason.NO_QUESTION),
        ("Question: ...?", False, SkipReason.NO_QUESTION),
        ("Question: <your question>", False, SkipReason.NO_QUESTION),
        ("Question: What colour is", True, SkipReason.CUT_OFF),
        ('{"question": "What colour is', True, SkipReason.CUT_OFF),
        ("Question: " + "very " * 24 + "large?", False, SkipReason.QUESTION_TOO_LONG),
        ("Question: What is it? And where is it?", False, SkipReason.COMPOUND_QUESTION),
        ("Question: What is it?\nQuestion: Where is it?", False, SkipReason.TOO_MANY_QUESTIONS),
        ("1. What is it?\n2. Where is it?", False, SkipReason.TOO_MANY_QUESTIONS),
    ],
)
def test_a_reply_without_one_clear_question_is_skipped(reply, truncated, reason):
    (result,) = parse_questions(reply, truncated=truncated)
    assert isinstance(result, Skipped) and result.reason is reason


def test_a_question_mark_inside_a_question():
    quoted = 'Which word follows "WHY?", and in which colour?'
    assert parse_questions(f"Question: {quoted}") == [quoted]


def test_only_the_last_field_may_be_cut():
    assert parse_questions("Question: Name the colour\nAnswer: bl", truncated=True) == ["Name the colour"]
    assert parse_questions("Question: Name the colour\n", truncated=True) == ["Name the colour"]
    assert parse_questions("Question: Name the colour.\nI hope", truncated=True) == ["Name the colour."]
    assert parse_questions("Question: Name the col", truncated=True)[0].reason is SkipReason.CUT_OFF


def test_several_questions():
    reply = "1. What is it?\n2. Where is it?\n3. How many are there?"
    assert parse_questions(reply, 3) == ["What is it?", "Where is it?", "How many are there?"]
    results = parse_questions("Question: What is it?\nQuestion: what is it\nQuestion: Where?", 4)
    assert results[:2] == ["What is it?", "Where?"]
    assert [r.reason for r in results[2:]] == [SkipReason.REPEATED_QUESTION, SkipReason.NO_QUESTION]
    assert {r.reason for r in parse_questions(reply, 2)} == {SkipReason.TOO_MANY_QUESTIONS}


PROMPT = "Two red cups stand on a blue table."
PAIRS = (("How many cups?", "two"), ("What colour is the table?", "blue"))
PLAIN = f"Prompt: {PROMPT}\nQuestion: How many cups?\nAnswer: two\nQuestion: What colour is the table?\nAnswer: blue"

TASKS = [
    PLAIN,
    PLAIN + "\n",
    PLAIN.lower().replace(PROMPT.lower(), PROMPT).replace("how", "How").replace("what", "What"),
    PLAIN.replace("\n", "\n\n"),
    PLAIN.replace("\n", " "),
    PLAIN.replace("Answer", "Expected answer").replace("\n", " "),
    PLAIN.replace("Answer", "Expected"),
    re.sub(r"(\w+):", r"**\1:**", PLAIN),
    re.sub(r"(\w+):", r"- **\1**:", PLAIN),
    PLAIN.replace("stand on", "stand\non"),
    PLAIN.replace("Question", "Q").replace("Answer", "A"),
    f"Here is the task.\n\n{PLAIN}\n\nEnjoy painting!",
    f"<prompt>{PROMPT}</prompt><spec>"
    + "".join(f"<qa><question>{q}</question><expected>{a}</expected></qa>" for q, a in PAIRS)
    + "</spec>",
    f"<prompt>\n{PROMPT}\n</prompt>\n<spec>\n"
    + "".join(f"<qa>\n<question>{q}</question>\n<expected>{a}</expected>\n</qa>\n" for q, a in PAIRS),
    f'{{"prompt": "{PROMPT}", "questions": [{{"question": "How many cups?", "answer": "two"}},'
    ' {"question": "What colour is the table?", "expected_answer": "blue"}]}',
]


@pytest.mark.parametrize("reply", TASKS)
def test_a_drawing_task_is_read(reply):
    assert parse_drawing_task(reply, 2) == DrawingTask(PROMPT, PAIRS)


def test_half_a_character_in_json_can_be_written():
    (question,) = parse_questions('{"question": "Is it \\ud83d?"}')
    assert question.encode() == b"Is it ??"


def test_a_number_in_json_is_an_answer():
    reply = (
        '{"prompt": "A cup.", "qa": [{"question": "How many?", "answer": 2}, {"question": "Why?", "answer": "a\\"b"}]}'
    )
    assert parse_drawing_task(reply).pairs == (("How many?", "2"), ("Why?", 'a"b'))
    assert parse_questions('{"question": "What is \\x?"}') == ["What is \\x?"]  # no escape of JSON, so kept


@pytest.mark.parametrize(
    "reply, truncated, reason",
    [
        ("", False, SkipReason.EMPTY_REPLY),
        ("Question: How many?\nAnswer: 2", False, SkipReason.NO_PROMPT),
        (PLAIN.replace(PROMPT, "What is it?"), False, SkipReason.NO_PROMPT),
        (f"{PLAIN}\nPrompt: Something else.", False, SkipReason.SEVERAL_PROMPTS),
        ("Prompt: Two red", True, SkipReason.CUT_OFF),
        (PLAIN.replace(PROMPT, "red " * 81), False, SkipReason.PROMPT_TOO_LONG),
        (f"Prompt: {PROMPT}", False, SkipReason.TOO_FEW_PAIRS),
        (PLAIN[:-4], True, SkipReason.TOO_FEW_PAIRS),
        (PLAIN[:-2], True, SkipReason.TOO_FEW_PAIRS),
        (PLAIN.replace("What colour is the table?", "how many cups"), False, SkipReason.TOO_FEW_PAIRS),
    ],
)
def test_a_task_that_is_not_clear_is_skipped(reply, truncated, reason):
    task = parse_drawing_task(reply, 2, truncated)
    assert isinstance(task, Skipped) and task.reason is reason


@pytest.mark.parametrize(
    "pair, reason",
    [
        ("Question: Where?", SkipReason.NO_ANSWER),
        ("Question: Where?\nAnswer: ...", SkipReason.NO_ANSWER),
        ("Question: Where?\nAnswer: " + "far " * 9, SkipReason.ANSWER_TOO_LONG),
        ("Question: " + "where " * 25 + "\nAnswer: here", SkipReason.QUESTION_TOO_LONG),
        ("Question: how many cups?\nAnswer: 2", SkipReason.REPEATED_QUESTION),
    ],
)
def test_a_pair_that_is_no_good_is_dropped_with_its_reason(pair, reason):
    task = parse_drawing_task(f"{PLAIN}\n{pair}")
    assert task.pairs == PAIRS and [d.reason for d in task.dropped] == [reason]


def test_no_more_pairs_than_asked_for_and_no_fewer_than_needed():
    assert parse_drawing_task(PLAIN, 1, rules=ProposalRules(min_pairs=1)).pairs == PAIRS[:1]
    skipped = parse_drawing_task(PLAIN, 2, rules=ProposalRules(min_pairs=3))
    assert skipped.text == "too_few_pairs: 2 of at least 3"


def test_quality_by_hand():
    repeated, empty = Skipped(SkipReason.REPEATED_QUESTION), Skipped(SkipReason.NO_ANSWER)
    assert DrawingTask("p", PAIRS).quality(2) == pytest.approx(1.0)
    assert DrawingTask("p", PAIRS).quality(3) == pytest.approx(0.5 * 2 / 3 + 0.3 + 0.2)
    # 2 of 3 asked for, 2 of 4 stated valid, 3 of 4 no repetition
    assert DrawingTask("p", PAIRS, (repeated, empty)).quality(3) == pytest.approx(1 / 3 + 0.15 + 0.15)
    yes_no = (("Is it?", "Yes."), ("Was it?", "no"))
    assert DrawingTask("p", yes_no).quality(2) == pytest.approx(0.8)
    assert DrawingTask("p", (*yes_no, PAIRS[0])).quality(3) == pytest.approx(1.0)


SCRAPS = [
    *(
        "Prompt:",
        "Question:",
        "Answer:",
        "<question>",
        "</question>",
        "<think>",
        "</think>",
        '"question": "',
        '"',
        "\n",
    ),
    *("red cups", "How many?", "2", " ", "1. ", "**", "{", "}", "<", ">", "?", "\n\n"),
]


@settings(deadline=None, max_examples=500)
@given(st.lists(st.sampled_from(SCRAPS), max_size=25), st.booleans())
def test_rubbish_never_raises_and_no_word_is_made_up(scraps, truncated):
    reply = "".join(scraps)
    task = parse_drawing_task(reply, 2, truncated, ProposalRules(min_pairs=1))
    stated = [] if isinstance(task, Skipped) else [task.prompt, *(text for pair in task.pairs for text in pair)]
    stated += [q for q in parse_questions(reply, 2, truncated) if isinstance(q, str)]
    words = set(re.findall(r"\w+", reply.replace("**", "")))
    assert all(set(re.findall(r"\w+", text)) <= words for text in stated)
    assert not any(re.search("<think>|</think>|</question>", text) for text in stated)


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(TASKS), st.data())
def test_a_reply_cut_anywhere_gives_right_pairs_or_none(reply, data):
    cut = reply[: data.draw(st.integers(0, len(reply)))]
    task = parse_drawing_task(cut, 2, truncated=True, rules=ProposalRules(min_pairs=1))
    if isinstance(task, DrawingTask):
        assert task.prompt == PROMPT and task.pairs == PAIRS[: len(task.pairs)]


@pytest.mark.parametrize(
    "scrap", ["Question: ", "What?\n", '"question": "', "<question>", " ", "* ", "Q1 ", "a: ", "<a"]
)
def test_a_proposer_that_repeats_itself_for_pages_takes_no_time(scrap):
    reply = scrap * (20_000 // len(scrap))
    started = time.perf_counter()
    parse_questions(reply, 3)
    parse_drawing_task(reply)
    assert time.perf_counter() - started < 5
