"""Short answers of the Solver: read from its reply, brought to one form, compared with a reference.

The released code compares substrings before numbers, so that 1 and 10 nearly agree, and knows no number words, so that
"two" and 2 do not. `ANSWER_RULES` holds its behaviour beside ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from unified_rl.reward.reply_text import CLOSE, Problem, answer_of
from unified_rl.reward.skips import Skipped, SkipReason


@dataclass(frozen=True)
class AnswerRules:
    """How answers are compared.

    Attributes:
        number_words: "two" is 2, "none" is 0, "1,000" is 1000; articles at the start and marks around words do not
            count. Otherwise only marks around the whole answer are dropped.
        numbers_first: numbers decide before words do, and a lone "not" or "no" contradicts. Otherwise one answer inside
            the other counts first.
        whole_words: one answer is inside the other only as whole words, not as characters.
        empty_reference: match with a reference that is empty; None refuses it.
        max_words: of an answer; the rest is dropped.
    """

    number_words: bool = True
    numbers_first: bool = True
    whole_words: bool = True
    empty_reference: float | None = None
    max_words: int = 8


ANSWER_RULES = {
    "self_consistency": AnswerRules(),
    "self_consistency_release": AnswerRules(False, False, False, empty_reference=0.5),
    "evolmm": AnswerRules(),
}
CANONICAL_WORDS = 5  # an answer in the form that is asked for has no more
INSIDE = 0.8  # match of an answer that is inside the other
NUMERIC_BANDS = ((0.01, 1.0), (0.05, 0.7), (0.20, 0.4))  # relative error up to, match

_UNITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_NUMBER_WORDS = {"none": 0} | {w: i for i, w in enumerate(_UNITS)} | {w: 10 * i for i, w in enumerate(_TENS, 2)}
_NUMBER = re.compile(r"[$€£#]?(?P<value>[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))[%°]?")
_STRAIGHT = str.maketrans("’‘“”−–", "''\"\"--")
_MARKS_BEFORE = re.compile(r"^(?:[^\w.+\-$€£#]|_|\.(?![0-9]))+")
_MARKS_BEHIND = re.compile(r"(?:[^\w%°+$€£]|_)+$")
_ARTICLES = ("a", "an", "the")
_TAG = re.compile(r"<\s*(?P<end>/?)\s*answer\s*>", re.IGNORECASE)
_LABEL = re.compile(r"\banswer(?: is)? *[:=] *(?P<answer>[^\n]+)", re.IGNORECASE)
_VAGUE = {
    "unknown", "unclear", "unsure", "uncertain", "unreadable", "something", "someone", "object", "thing", "many",
    "several", "some", "few", "various", "n/a", "maybe", "depends",
}  # fmt: skip
_CANNOT_TELL = re.compile(
    r"(?:can ?not|can't|hard to|unable to|impossible to|do not|don't) *(?:tell|say|see|know|be)\b"
)


@dataclass(frozen=True)
class SolverAnswer:
    """An answer that could be read.

    Attributes:
        text: in the one form of `normalise`; never empty.
        words_before: words of the reply before the answer.
        canonical: the reply has the form that was asked for, and the answer at most CANONICAL_WORDS words.
        span: where the answer stands in the reply, (start, end) in characters.
    """

    text: str
    words_before: int = 0
    canonical: bool = True
    span: tuple[int, int] = (0, 0)

    @property
    def is_vague(self) -> bool:
        """Whether it says nothing that could be checked."""
        return self.text in _VAGUE or bool(_CANNOT_TELL.search(self.text))


def normalise(answer: str, rules: AnswerRules = ANSWER_RULES["self_consistency"]) -> str:
    """The answer in the form in which answers are compared; empty where nothing is left."""
    text = answer.lower()
    if not rules.number_words:
        return " ".join(_trimmed(" ".join(text.replace(",", " ").split())).split()[: rules.max_words])
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text.translate(_STRAIGHT))
    words = [_trimmed(word) for word in text.replace(",", " ").split()]
    words = _with_digits([word for word in words if word])
    while len(words) > 1 and words[0] in _ARTICLES:
        words = words[1:]
    return " ".join(words[: rules.max_words])


def read_answer(
    reply: str,
    truncated: bool = False,
    tagged: bool = True,
    rules: AnswerRules = ANSWER_RULES["self_consistency"],
) -> SolverAnswer | Skipped:
    """The answer of a reply: in `<answer>` tags, behind the word answer, or the whole of a short reply.

    Args:
        reply: as the Solver wrote it, with or without a plan.
        truncated: the reply was stopped by its length limit, so an answer at its very end may lack words.
        tagged: tags were asked for (the full wording), so only a reply with tags is canonical.
    """
    tail = answer_of(reply)
    if isinstance(tail, Problem):
        blank = not reply.strip()
        return Skipped(SkipReason.EMPTY_REPLY if blank else SkipReason.NO_ANSWER, "" if blank else tail.reason)
    offset = max((match.end() for match in CLOSE.finditer(reply)), default=0)  # the tail begins behind the plan
    found, closed = _spans(tail, rules.max_words)
    texts = [normalise(tail[start:end], rules) for start, end in found]
    stated = [(text, span) for text, span in zip(texts, found, strict=True) if text]
    if not stated:
        return Skipped(SkipReason.NO_ANSWER, f"the reply ends {tail.strip()[-80:]!r}")
    if len({text for text, _ in stated}) > 1:
        return Skipped(SkipReason.SEVERAL_ANSWERS, ", ".join(dict.fromkeys(text for text, _ in stated))[:200])
    text, (start, end) = stated[-1]
    if truncated and not closed and end == len(tail.rstrip()):
        return Skipped(SkipReason.CUT_OFF, f"the reply ends {tail[-80:]!r}")
    start, end = start + offset, end + offset
    whole = not reply[:start].strip() and not reply[end:].strip()
    canonical = (closed if tagged else whole) and len(text.split()) <= CANONICAL_WORDS
    before = _TAG.sub(" ", reply[:start])
    return SolverAnswer(text, len(before.split()), canonical, (start, end))


def answer_tokens(pieces: Sequence[str], truncated: bool = False, tagged: bool = True) -> list[bool] | Skipped:
    """For each token of a reply, whether it writes any part of the answer itself (not of its tags).

    Args:
        pieces: the T tokens of the reply, each decoded alone; empty for special tokens.
    """
    read = read_answer("".join(pieces), truncated, tagged)
    if isinstance(read, Skipped):
        return read
    inside, position = [], 0
    for piece in pieces:
        overlap = min(position + len(piece), read.span[1]) - max(position, read.span[0])
        inside.append(overlap > 0)
        position += len(piece)
    return inside


def match(answer: str, reference: str, rules: AnswerRules = ANSWER_RULES["self_consistency"]) -> float:
    """How well two answers in the form of `normalise` agree, 0..1.

    1 for equal ones; by relative error (to the reference, at least 1) for two numbers; INSIDE for one inside the
    other; else the share of common words.

    Raises:
        ValueError: an empty reference, where the rules refuse it.
    """
    if not reference:
        if rules.empty_reference is None:
            raise ValueError("the reference answer is empty")
        return rules.empty_reference
    if answer == reference:
        return 1.0
    by_number = _match_numbers(answer, reference, rules.numbers_first)
    if by_number is not None and rules.numbers_first:
        return by_number
    if answer and _is_inside(answer, reference, rules.whole_words):
        return INSIDE
    if by_number is not None:
        return by_number
    mine, theirs = set(answer.split()), set(reference.split())
    return len(mine & theirs) / len(mine | theirs)


def polarity(answer: str) -> str | None:
    """`yes` or `no` where a normalised answer begins with it, else None."""
    first = answer.split(maxsplit=1)[:1]
    return first[0] if first and first[0] in ("yes", "no") else None


def _trimmed(text: str) -> str:
    return _MARKS_BEHIND.sub("", _MARKS_BEFORE.sub("", text))


def _with_digits(words: list[str]) -> list[str]:
    """Number words up to ninety-nine as digits, decimals without needless zeros."""
    words = [p for w in words for p in (w.split("-") if all(p in _NUMBER_WORDS for p in w.split("-")) else [w])]
    digits: list[str] = []
    joinable = False  # the last entry came from a word like twenty
    for word in words:
        value = _NUMBER_WORDS.get(word)
        if value is None:
            digits.append(re.sub(r"^([+-]?[0-9]*\.[0-9]*?)0+$", r"\1", word).rstrip(".") or word)
        elif joinable and 0 < value < 10:
            digits[-1] = str(int(digits[-1]) + value)
        else:
            digits.append(str(value))
        joinable = word in _TENS
    return digits


def _spans(tail: str, max_words: int) -> tuple[list[tuple[int, int]], bool]:
    """Where answers stand in a reply, and whether the last one stands between an opening and a closing tag."""
    spans, closed = [], False
    tags = list(_TAG.finditer(tail))
    for tag, following in zip(tags, [*tags, None][1:], strict=True):
        if tag["end"]:
            continue
        closed = following is not None and bool(following["end"])
        end = following.start() if following else len(tail)
        line = end if closed else tail.find("\n", tag.end(), end)  # an open tag ends with its line
        spans.append(_stripped(tail, tag.end(), end if line < 0 else line))
    if not spans:
        spans = [_stripped(tail, *m.span("answer")) for m in _LABEL.finditer(tail)]
    if not spans and "\n" not in tail.strip() and len(tail.split()) <= max_words:
        spans = [_stripped(tail, 0, len(tail))]
    return spans, closed


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    part = text[start:end]
    return start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())


def _numbers(text: str) -> list[float]:
    return [float(m["value"]) for m in map(_NUMBER.fullmatch, text.split()) if m]


def _match_numbers(answer: str, reference: str, strict: bool) -> float | None:
    """Match by the numbers of both answers; None where they do not decide."""
    mine, theirs = _numbers(answer), _numbers(reference)
    if len(mine) == len(theirs) == 1 == len(answer.split()) == len(reference.split()):
        error = abs(mine[0] - theirs[0]) / max(abs(theirs[0]), 1.0)
        return next((value for bound, value in NUMERIC_BANDS if error <= bound + 1.0e-9), 0.0)
    if strict and mine and theirs and set(mine) != set(theirs):
        return 0.0
    return 0.0 if strict and _is_negated(answer) != _is_negated(reference) else None


def _is_negated(text: str) -> bool:
    return any(word in ("no", "not") or word.endswith("n't") for word in text.split())


def _is_inside(answer: str, reference: str, whole_words: bool) -> bool:
    pad = " " if whole_words else ""
    first, second = f"{pad}{answer}{pad}", f"{pad}{reference}{pad}"
    return first in second or second in first
