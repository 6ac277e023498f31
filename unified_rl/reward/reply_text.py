"""Reading a judge's free text: where its answer begins, what is left without markup, and which number it states.

Nothing here guesses. A number that is cut off, has a rival beside it or is on another scale is a `Problem`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_OPEN = re.compile(r"<\s*think(?:ing)?\s*>", re.IGNORECASE)
CLOSE = re.compile(r"<\s*/\s*think(?:ing)?\s*>", re.IGNORECASE)
_MARKUP = '*`"“”„$\u200b\ufeff\r\\'
_CHARACTERS = str.maketrans(
    {"：": ":", "＝": "=", "−": "-", "－": "-", "﹣": "-", "＋": "+", "｜": "|", "\xa0": " ", "\t": " ", "_": " "}
    | dict.fromkeys(_MARKUP, "")
)
_FIELD_TAG = re.compile(r"<\s*(score|object|reason|region|id)\s*>", re.IGNORECASE)
_NEW_LINE_TAG = re.compile(r"</[^<>\n]*>|<br\s*/?>|<\|[^<>\n]*\|>", re.IGNORECASE)
_OTHER_TAG = re.compile(r"<[a-z][^<>\n]*>", re.IGNORECASE)
_NUMBER = re.compile(
    r"(?P<sign>[+\-–])?(?P<gap> ?)(?P<digits>[0-9]+\.?[0-9]*|\.[0-9]+)(?P<exponent>e[+-]?[0-9]+)?", re.IGNORECASE
)
_OPENING = re.compile(r"[ \[(<]*")
# What may follow the number on its line only if the number is not the score, or not all of it.
_RIVAL = re.compile(
    r"\.[0-9.]|\.{2,}"  # 0.8.5, 0...
    r"|,[0-9]|, *[+\-–]?[0-9]*\.?[0-9]+ *(?:[\])}>]|$)"  # 0,8 and [-1, 1]
    r"| *(?:to|or|and|of|out of|\+|-+>|→|-|–|—|~|…|/|⁄|±|\+/-) *[+\-–]?\.?[0-9]"  # ranges and other scales
    r"| +[+\-–]?\.?[0-9]"  # 1 000, 0.8 0.9
    r"| *(?:%|percent)| *[:=]",
    re.IGNORECASE,
)
_OF_ONE = re.compile(r" *(?:/|out of) *1(?:\.0*)?(?![0-9.,])", re.IGNORECASE)

# Marks that `plain_text` puts on lines of their own. Unlike \x1e they are no white space to Python.
BREAK = "\0"  # a ruler
END = "\0\0"  # a brace: what follows belongs to another item


@dataclass(frozen=True)
class Problem:
    """Why no number could be read; `silent` where none is stated at all, so that it contradicts no other."""

    reason: str
    silent: bool = False


def writable(text: str) -> str:
    """`text` with a question mark for each half of a surrogate pair, which JSON may hold but UTF-8 cannot."""
    return text.encode(errors="replace").decode()


def answer_of(reply: str) -> str | Problem:
    """What follows the judge's plan, its `<think>` part.

    A plan is never read for scores: it weighs numbers that the judge may give up again.
    """
    if not reply.strip():
        return Problem("the reply is empty", silent=True)
    *_, answer = CLOSE.split(reply)
    before, *plan = _OPEN.split(answer)
    if before.strip():
        return before
    if plan:
        return Problem("the plan was cut off before the answer", silent=True)
    return Problem("nothing follows the plan", silent=True)


def plain_text(answer: str) -> str:
    """The answer without markdown, HTML, LaTeX and quotes; rulers and braces become `BREAK` and `END`.

    Characters are replaced one by one: Unicode normalisation would turn 0.8² into 0.82.
    """
    answer = answer.replace(BREAK, " ")
    answer = re.sub(r"\\boxed\{([^{}]*)\}", r" \1 ", answer)
    answer = re.sub(r"```[a-z]*", " ", answer)
    answer = re.sub(r"^[ \t>]*(?:[-*_=][ \t]*){3,}$", f"\n{BREAK}\n", answer, flags=re.MULTILINE)
    answer = re.sub(r"[{}]", f"\n{END}\n", answer)
    answer = re.sub(r"'([\w +\-.]*)'", r" \1 ", answer)  # quoted names, not apostrophes
    answer = _FIELD_TAG.sub(r"\n\1: ", answer)
    answer = _OTHER_TAG.sub(" ", _NEW_LINE_TAG.sub("\n", answer))
    # 0.3**2 must not become 0.32.
    answer = re.sub(rf"(?<=[0-9.])[{re.escape(_MARKUP)}]+(?=[0-9.])", " ", answer)
    lines = [re.sub(r"^[ #>]+", "", line).rstrip() for line in answer.translate(_CHARACTERS).split("\n")]
    return "\n".join(lines).strip()


def read_number(text: str, start: int, truncated: bool) -> float | Problem:
    """The score in -1..1 that stands at `start` of plain text, or alone on the next line that is not empty.

    Args:
        text: as `plain_text` returns it.
        start: just behind the label and its colon.
        truncated: the reply was stopped by its length limit, so a number at the very end may lack digits.
    """
    line_end = _line_end(text, start)
    begin = _OPENING.match(text, start, line_end).end()
    alone = begin == line_end
    if alone:
        begin = start + len(text[start:]) - len(text[start:].lstrip())
        line_end = _line_end(text, begin)
    match = _NUMBER.match(text, begin, line_end)
    rest = text[match.end() : line_end] if match else ""
    # On a line of its own, a whole number without a sign could as well be the number of the next item.
    if match is None or (alone and (rest.strip(" .])") or not re.search(r"[+\-–]|\.[0-9]", match.group()))):
        return Problem("no number follows the word score", silent=True)
    if match["gap"] and rest.strip(" .])"):
        return Problem(f"it is unclear whether {match.group()!r} is a negative number or a remark")
    quoted = (match.group() + rest)[:40].strip()
    rest = _OF_ONE.sub("", rest, count=1) if _OF_ONE.match(rest) else rest
    if rest[:1].isalnum() or _RIVAL.match(rest):
        return Problem(f"{quoted!r} is not one number on the scale from -1 to 1")
    value = float(match["digits"] + (match["exponent"] or ""))
    cut = match.end() == len(text) and (truncated or match["digits"].endswith("."))
    # 1. at the end is 1 however it goes on: anything larger is out of range.
    if cut and not (value == 1.0 and "." in match["digits"]):
        return Problem(f"the reply may have been cut off inside the number {match.group()[:40]!r}")
    if not value <= 1.0:
        return Problem(f"the score {match.group()[:40]} is outside -1..1")
    return -value if match["sign"] in ("-", "–") and value else value


def bare_number(text: str, truncated: bool) -> float | Problem | None:
    """The number that is the whole of plain text; None where there is anything else."""
    return read_number(text, 0, truncated) if _NUMBER.fullmatch(text.strip(" .[]()")) else None


def settle(readings: list[float | Problem]) -> float | Problem:
    """The one number among several readings of the same score; a contradiction is a problem, never a choice."""
    problems = [r for r in readings if isinstance(r, Problem)]
    values = sorted({r for r in readings if not isinstance(r, Problem)})
    loud = [p for p in problems if not p.silent]
    if loud:
        return loud[0]
    if len(values) > 1:
        return Problem(f"the reply states different scores: {', '.join(f'{v:g}' for v in values)}")
    if values:
        return values[0]
    return problems[0] if problems else Problem("the reply holds no score", silent=True)


def _line_end(text: str, start: int) -> int:
    end = text.find("\n", start)
    return len(text) if end < 0 else end
