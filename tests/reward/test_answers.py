"""Answers of the Solver: read from any shape of reply, brought to one form, compared without the release's faults."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unified_rl.reward.answers import (
    ANSWER_RULES,
    SolverAnswer,
    answer_tokens,
    match,
    normalise,
    polarity,
    read_answer,
)
from unified_rl.reward.skips import Skipped, SkipReason

RELEASE = ANSWER_RULES["self_consistency_release"]


@pytest.mark.parametrize(
    "answer, form",
    [
        ("Red", "red"),
        ("  Dark   Green. ", "dark green"),
        ("red, white,blue", "red white blue"),
        ("The dog", "dog"),
        ("a", "a"),
        ("vitamin a", "vitamin a"),
        ('"STOP!"', "stop"),
        ("**two**", "2"),
        ("`_red_`", "red"),
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("zero", "0"),
        ("nineteen", "19"),
        ("twenty", "20"),
        ("twenty-one", "21"),
        ("Forty two", "42"),
        ("twenty twelve", "20 12"),
        ("one two", "1 2"),
        ("thirty zero", "30 0"),
        ("well-known", "well-known"),
        ("1,000", "1000"),
        ("12,345,678 people", "12345678 people"),
        ("1,2,3", "1 2 3"),
        ("2.0", "2"),
        ("2.50", "2.5"),
        (".5", ".5"),
        ("-5", "-5"),
        ("\u22125", "-5"),
        ("100", "100"),
        ("007", "007"),
        ("$5.", "$5"),
        ("50%", "50%"),
        ("C++", "c++"),
        ("it\u2019s", "it's"),
        ("- red", "red"),
        ("...", ""),
        ("", ""),
        ("1 2 3 4 5 6 7 8 9 10", "1 2 3 4 5 6 7 8"),
    ],
)
def test_the_one_form(answer, form):
    assert normalise(answer) == form
    assert normalise(form) == form


@pytest.mark.parametrize(
    "answer, form",
    [
        ("Two dogs", "two dogs"),
        ("The  dog.", "the dog"),
        ("red,white", "red white"),
        ("(a) b.", "a) b"),
        ("2.0", "2.0"),
    ],
)
def test_the_form_of_the_release(answer, form):
    assert normalise(answer, RELEASE) == form


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=60))
def test_the_form_is_final(text):
    assert normalise(normalise(text)) == normalise(text)
    assert len(normalise(text).split()) <= 8


# answer, reference, ours, the release's
MATCHES = [
    ("red", "red", 1.0, 1.0),
    ("1", "10", 0.0, 0.8),  # the release finds the character 1 in 10
    ("two", "2", 1.0, 0.0),
    ("2.0", "2", 1.0, 0.8),
    ("100", "101", 1.0, 1.0),
    ("100", "104", 0.7, 0.7),
    ("4", "5", 0.4, 0.4),
    ("3", "5", 0.0, 0.0),
    ("1", "0", 0.0, 0.0),  # relative to at least 1
    ("3 dogs", "3", 0.8, 0.8),
    ("3 dogs", "10 dogs", 0.0, 1 / 3),
    ("3 dogs", "3 cats", 1 / 3, 1 / 3),
    ("dark green", "green", 0.8, 0.8),
    ("green", "dark green", 0.8, 0.8),
    ("cat", "category", 0.0, 0.8),  # not a word of it
    ("art", "a red cart", 0.0, 0.8),
    ("red car", "blue car", 1 / 3, 1 / 3),
    ("red and blue", "blue and red", 1.0, 1.0),  # the same words
    ("not red", "red", 0.0, 0.8),
    ("no dog", "dog", 0.0, 0.8),
    ("it isn't red", "red", 0.0, 0.8),
    ("yes it is", "yes", 0.8, 0.8),
    ("yes", "no", 0.0, 0.0),
    ("no", "no dog", 0.8, 0.8),
    ("", "red", 0.0, 0.8),  # every text holds the empty one
]


@pytest.mark.parametrize("answer, reference, ours, theirs", MATCHES)
def test_match(answer, reference, ours, theirs):
    assert match(normalise(answer), normalise(reference)) == pytest.approx(ours)
    if answer:
        assert match(normalise(answer, RELEASE), normalise(reference, RELEASE), RELEASE) == pytest.approx(theirs)


def test_without_a_reference():
    assert match("red", "", RELEASE) == 0.5
    with pytest.raises(ValueError, match="reference answer is empty"):
        match("red", "")


WORDS = st.lists(st.sampled_from(["red", "1", "10", "2", "not", "no", "dog", "cat", "a"]), max_size=5).map(" ".join)


@settings(deadline=None, max_examples=200)
@given(WORDS, WORDS)
def test_match_is_a_share_and_highest_for_equals(answer, reference):
    answer, reference = normalise(answer), normalise(reference)
    if reference:
        assert 0 <= match(answer, reference) <= 1 == match(reference, reference)


def test_polarity():
    assert [polarity(a) for a in ("yes", "yes it is", "no dog")] == ["yes", "yes", "no"]
    assert [polarity(a) for a in ("not red", "", "nobody")] == [None] * 3


# reply, tags asked for, text, words before, canonical
READ = [
    ("<answer>Red</answer>", True, "red", 0, True),
    ("<answer> two </answer>", True, "2", 0, True),
    ("I see a cup on the left. <answer>a cup</answer>", True, "cup", 7, True),
    ("< ANSWER >red</ Answer >", True, "red", 0, True),
    ("<answer>red</answer>\nI hope this helps.", True, "red", 0, True),
    ("<answer>red", True, "red", 0, False),
    ("<answer>red\nbecause it is", True, "red", 0, False),
    ("<answer>red</answer> or rather <answer>Red.</answer>", True, "red", 3, True),
    ("<answer></answer><answer>red</answer>", True, "red", 0, True),
    ("<answer>1 2 3 4 5 6</answer>", True, "1 2 3 4 5 6", 0, False),
    ("Answer: red", True, "red", 1, False),
    ("The answer is: red", True, "red", 3, False),
    ("red", True, "red", 0, False),
    ("red", False, "red", 0, True),
    (" Two\n", False, "2", 0, True),
    ("one two three four five six", False, "1 2 3 4 5 6", 0, False),
    ("<answer>red</answer>", False, "red", 0, False),
    ("<think>Is it <answer>blue</answer>?</think><answer>red</answer>", True, "red", 4, True),
    ("4 <think>I count 4 cups", False, "4", 0, False),
]


@pytest.mark.parametrize("reply, tagged, text, before, canonical", READ)
def test_an_answer_is_read(reply, tagged, text, before, canonical):
    read = read_answer(reply, tagged=tagged)
    assert (read.text, read.words_before, read.canonical) == (text, before, canonical)
    assert normalise(reply[slice(*read.span)]) == text


@pytest.mark.parametrize(
    "reply, truncated, reason",
    [
        ("", False, SkipReason.EMPTY_REPLY),
        (" \n", False, SkipReason.EMPTY_REPLY),
        ("<think>hm", True, SkipReason.NO_ANSWER),
        ("<answer></answer>", False, SkipReason.NO_ANSWER),
        ("<answer>...</answer>", False, SkipReason.NO_ANSWER),
        ("I look at the picture and I think that it is red, or so", False, SkipReason.NO_ANSWER),
        ("red\nor blue", False, SkipReason.NO_ANSWER),
        ("<answer>red</answer><answer>blue</answer>", False, SkipReason.SEVERAL_ANSWERS),
        ("<answer>dark gr", True, SkipReason.CUT_OFF),
        ("dark", True, SkipReason.CUT_OFF),
        ("Answer: dark", True, SkipReason.CUT_OFF),
    ],
)
def test_an_answer_that_is_not_clear_is_skipped(reply, truncated, reason):
    assert read_answer(reply, truncated).reason is reason


def test_a_closed_answer_is_whole_even_if_the_reply_is_cut():
    assert read_answer("<answer>red</answer>", truncated=True).text == "red"
    assert read_answer("<answer>red</answer> because", truncated=True).text == "red"


def test_vague_answers():
    vague = [SolverAnswer(t).is_vague for t in ("several", "unknown", "cannot tell", "can't say", "hard to see")]
    assert vague == [True] * 5
    assert not any(SolverAnswer(t).is_vague for t in ("7", "no", "red", "seven", "nothing"))


def test_tokens_of_the_answer():
    pieces = ["<", "answer", ">", "dark", " green", "</", "answer", ">", ""]
    assert answer_tokens(pieces) == [False, False, False, True, True, False, False, False, False]
    assert answer_tokens(["<answer", ">re", "d</", "answer>"]) == [False, True, True, False]  # part of it counts
    assert answer_tokens(["tw", "o", ""], tagged=False) == [True, True, False]
    assert answer_tokens(["Well", ", ", "<answer>", "\n", "4", "\n", "</answer>"]) == [False] * 4 + [True] + [False] * 2
    assert answer_tokens(["<answer>", "</answer>"]).reason is SkipReason.NO_ANSWER


SCRAPS = ["<answer>", "</answer>", "<think>", "</think>", "red", "two", " ", "\n", "answer: ", "Answer is", ".", ","]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(SCRAPS), max_size=15), st.booleans(), st.booleans())
def test_rubbish_never_raises_and_no_answer_is_made_up(scraps, truncated, tagged):
    reply = "".join(scraps)
    read = read_answer(reply, truncated, tagged)
    marks = answer_tokens(scraps, truncated, tagged)
    if isinstance(read, Skipped):
        assert marks == read
    else:
        assert normalise(reply[slice(*read.span)]) == read.text != ""
        assert "".join(p for p, inside in zip(scraps, marks, strict=True) if inside).strip() != ""
        assert not re.search("think", read.text)


@pytest.mark.parametrize("scrap", ["<answer>", "answer: ", "<answer>red</answer>", "red ", "can not "])
def test_a_solver_that_repeats_itself_for_pages_takes_no_time(scrap):
    started = time.perf_counter()
    read_answer(scrap * (20_000 // len(scrap)))
    assert time.perf_counter() - started < 5
