"""The Proposer's replies: questions about a picture, and drawing tasks (a prompt with questions that check a drawing).

Fields are read from labelled lines, markdown, lists, tags and JSON. Markup is dropped and nothing else is rewritten:
the text that is rewarded is the text that was sampled. A reply that is not clear is `Skipped` with its reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from unified_rl.reward.answers import normalise, polarity
from unified_rl.reward.reply_text import Problem, answer_of, writable
from unified_rl.reward.skips import Skipped, SkipReason


@dataclass(frozen=True)
class ProposalRules:
    """Bounds of what is accepted, in words and in pairs of question and answer."""

    max_question_words: int = 24
    max_expected_words: int = 8
    max_prompt_words: int = 80
    min_pairs: int = 2


@dataclass(frozen=True)
class DrawingTask:
    """A prompt to draw from and what must be true of a drawing.

    Attributes:
        prompt: as the Proposer wrote it.
        pairs: (question, expected answer), valid and different ones.
        dropped: why other pairs of the reply are not among them.
    """

    prompt: str
    pairs: tuple[tuple[str, str], ...]
    dropped: tuple[Skipped, ...] = ()

    def quality(self, asked: int) -> float:
        """Q in 0..1 of a task with `asked` questions asked for.

        .5 share of the pairs asked for that are valid, .3 share of the stated pairs that are valid, .2 share of the
        stated pairs that are not repetitions, less .2 where every answer is yes or no.
        """
        stated = len(self.pairs) + len(self.dropped)
        repeated = sum(d.reason is SkipReason.REPEATED_QUESTION for d in self.dropped)
        value = 0.5 * min(len(self.pairs) / asked, 1.0)
        value += 0.3 * len(self.pairs) / stated + 0.2 * (1.0 - repeated / stated)
        return value - 0.2 * all(polarity(normalise(expected)) for _, expected in self.pairs)


@dataclass
class _Field:
    """A labelled value; `cut` where the reply was stopped inside it."""

    label: str
    value: str
    cut: bool = False


_NAMES = r"prompt|question|(?:expected[ _]?)?answer|expected"
_JSON_FIELD = re.compile(rf'"(?P<label>{_NAMES})" *: *(?P<value>"(?:[^"\\\n]|\\.)*"?|-?[0-9.]+|true|false)', re.I)
_TAG = re.compile(rf"<\s*(?P<end>/?)\s*(?P<label>{_NAMES})\s*>", re.I)
_OTHER_TAG = re.compile(r"<[a-z/|｜][^<>\n]{0,80}>", re.I)
# A label within a line: behind a mark, or with a capital.
_MID_LINE = re.compile(
    rf"(?:(?<=[.?!;|,\"')*_])[ \t|]+|(?<=\S)(?<![Ee]xpected)[ \t|]+(?=[*_]*[A-Z]))"
    rf"(?=[*_]*(?i:{_NAMES})[ *_]*[0-9]{{0,2}}[*_]*[:：])"
)
_BULLET = re.compile(r"^[\s>#*_\-•+|]*(?:\(?[0-9]{1,2}[.)](?=\s))?\s*")
_LABEL = re.compile(
    rf"^(?:(?:the|my|final|verification) )*(?P<label>{_NAMES}|q|a)[ #*_]*[0-9]{{0,2}}[ *_]*(?:[:：]|[.)](?= ))"
    r"[ *_]*(?P<value>.*)$",
    re.I,
)
_QUOTED = re.compile(r'^(["“„])(?P<inner>[^"“”]*)["”]$')
_AFTER_QUESTION = re.compile(r"\?[\"'”)\]]*\s+\w")


def parse_questions(
    reply: str, count: int = 1, truncated: bool = False, rules: ProposalRules | None = None
) -> list[str | Skipped]:
    """Exactly `count` results: questions in their order, then for each that is missing or no good why.

    Args:
        reply: as the Proposer wrote it, with or without a plan.
        truncated: the reply was stopped by its length limit.
    """
    rules = rules or ProposalRules()
    answer = answer_of(reply)
    if isinstance(answer, Problem):
        return [Skipped(_empty_or(SkipReason.NO_QUESTION, reply), answer.reason)] * count
    fields, loose = _fields(answer, truncated)
    found = [f for f in fields if f.label == "question"] or [f for f in loose if f.value.endswith("?")]
    if count == 1:  # a question said twice is one question
        found = list({f.value: f for f in found}.values())
    if len(found) > count:
        return [Skipped(SkipReason.TOO_MANY_QUESTIONS, f"{len(found)} instead of {count}")] * count
    results: list[str | Skipped] = []
    for question in found:
        results.append(_checked_question(question, [r for r in results if isinstance(r, str)], rules))
    missing = Skipped(SkipReason.NO_QUESTION, f"the reply ends {answer.strip()[-80:]!r}")
    results += [missing] * (count - len(results))
    return sorted(results, key=lambda result: isinstance(result, Skipped))


def parse_drawing_task(
    reply: str, pairs: int = 3, truncated: bool = False, rules: ProposalRules | None = None
) -> DrawingTask | Skipped:
    """The prompt and up to `pairs` pairs of question and expected answer; arguments as for `parse_questions`."""
    rules = rules or ProposalRules()
    answer = answer_of(reply)
    if isinstance(answer, Problem):
        return Skipped(_empty_or(SkipReason.NO_PROMPT, reply), answer.reason)
    fields, _ = _fields(answer, truncated)
    prompt = _checked_prompt([f for f in fields if f.label == "prompt"], rules)
    if isinstance(prompt, Skipped):
        return prompt
    kept: list[tuple[str, str]] = []
    dropped: list[Skipped] = []
    for question, expected in _paired(fields):
        pair = _checked_pair(question, expected, [q for q, _ in kept], rules)
        if isinstance(pair, Skipped):
            dropped.append(pair)
        elif len(kept) < pairs:
            kept.append(pair)
    if len(kept) < rules.min_pairs:
        why = "; ".join(d.text for d in dropped)[:200]
        short = f"{len(kept)} of at least {rules.min_pairs}"
        return Skipped(SkipReason.TOO_FEW_PAIRS, f"{short}: {why}" if why else short)
    return DrawingTask(prompt, tuple(kept), tuple(dropped))


def _fields(answer: str, truncated: bool) -> tuple[list[_Field], list[_Field]]:
    """Labelled values of a reply in their order, and other lines."""
    lines = _one_field_a_line(answer).split("\n")
    fields: list[_Field] = []
    loose: list[_Field] = []
    current: _Field | None = None  # which may go on in the next line
    last = 0
    for number, raw in enumerate(lines):
        line = re.sub(r"\*\*|`+", "", _BULLET.sub("", raw)).strip()
        label = _LABEL.match(line)
        if label:
            name = {"p": "prompt", "q": "question"}.get(label["label"][0].lower(), "answer")
            current = _Field(name, label["value"].strip())
            fields.append(current)
        elif not line:
            current = current if current and not current.value else None
        elif current and _goes_on(current):
            current.value = f"{current.value} {line}".strip()
        else:
            current = _Field("", line)
            loose.append(current)
        last = number if line else last
    for found in (*fields, *loose):
        quoted = _QUOTED.match(found.value)
        found.value = quoted["inner"].strip() if quoted else found.value
    if truncated and current and last == len(lines) - 1:
        current.cut = not current.value.endswith("?")
    return fields, loose


def _goes_on(field: _Field) -> bool:
    """Whether the next line may belong to a field: a prompt has all of its sentences, a question is one."""
    asked = field.label == "question" and not field.value.endswith((".", "?", "!"))
    return not field.value or asked or field.label == "prompt"


def _one_field_a_line(answer: str) -> str:
    """The reply with JSON and tags as labelled lines of their own."""
    text = _JSON_FIELD.sub(_json_line, answer)
    text = _TAG.sub(lambda m: "\n\n" if m["end"] else f"\n{m['label']}: ", text)
    return _MID_LINE.sub("\n", _OTHER_TAG.sub("\n", text))


def _json_line(match: re.Match[str]) -> str:
    value = match["value"]
    if not value.startswith('"'):
        return f"\n{match['label']}: {value}\n"
    if len(value) < 2 or not value.endswith('"'):
        return f"\n{match['label']}: {value[1:]}"
    try:
        value = writable(json.loads(value))
    except ValueError:  # an escape that JSON does not know
        value = value[1:-1]
    return f"\n{match['label']}: {' '.join(value.split())}\n\n"


def _paired(fields: Sequence[_Field]) -> list[tuple[_Field, _Field | None]]:
    """Each question with the answer that follows it, or None."""
    pairs: list[tuple[_Field, _Field | None]] = []
    for field in fields:
        if field.label == "question":
            pairs.append((field, None))
        elif field.label == "answer" and pairs and pairs[-1][1] is None:
            pairs[-1] = (pairs[-1][0], field)
    return pairs


def _checked_question(field: _Field, earlier: Sequence[str], rules: ProposalRules) -> str | Skipped:
    text = field.value
    if not any(c.isalpha() for c in text):
        return Skipped(SkipReason.NO_QUESTION, f"the question is {text!r}")
    if field.cut:
        return Skipped(SkipReason.CUT_OFF, f"the question ends {text[-80:]!r}")
    words = len(text.split())
    if words > rules.max_question_words:
        return Skipped(SkipReason.QUESTION_TOO_LONG, f"{words} words, more than {rules.max_question_words}")
    if _AFTER_QUESTION.search(text):
        return Skipped(SkipReason.COMPOUND_QUESTION, text[:200])
    if normalised_question(text) in map(normalised_question, earlier):
        return Skipped(SkipReason.REPEATED_QUESTION, text[:200])
    return text


def normalised_question(question: str) -> str:
    """The words of a question, by which repetitions are known."""
    return " ".join(re.findall(r"\w+", question.lower()))


def _checked_prompt(found: Sequence[_Field], rules: ProposalRules) -> str | Skipped:
    texts = list(dict.fromkeys(f.value for f in found if f.value))
    if len(texts) != 1:
        return Skipped(SkipReason.SEVERAL_PROMPTS if texts else SkipReason.NO_PROMPT, " / ".join(texts)[:200])
    if any(f.cut for f in found):
        return Skipped(SkipReason.CUT_OFF, f"the prompt ends {texts[0][-80:]!r}")
    if texts[0].endswith("?") or not any(c.isalpha() for c in texts[0]):
        return Skipped(SkipReason.NO_PROMPT, f"{texts[0][:200]!r} states nothing")
    words = len(texts[0].split())
    if words > rules.max_prompt_words:
        return Skipped(SkipReason.PROMPT_TOO_LONG, f"{words} words, more than {rules.max_prompt_words}")
    return texts[0]


def _checked_pair(
    question: _Field, expected: _Field | None, earlier: Sequence[str], rules: ProposalRules
) -> tuple[str, str] | Skipped:
    text = _checked_question(question, earlier, rules)
    if isinstance(text, Skipped):
        return text
    if expected is None or not normalise(expected.value):
        return Skipped(SkipReason.NO_ANSWER, f"to {text[:200]!r}")
    if expected.cut:
        return Skipped(SkipReason.CUT_OFF, f"the answer ends {expected.value[-80:]!r}")
    words = len(expected.value.split())
    if words > rules.max_expected_words:
        return Skipped(SkipReason.ANSWER_TOO_LONG, f"{words} words, more than {rules.max_expected_words}")
    return text, expected.value


def _empty_or(reason: SkipReason, reply: str) -> SkipReason:
    return reason if reply.strip() else SkipReason.EMPTY_REPLY
