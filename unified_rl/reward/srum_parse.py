"""The judge's replies as scores (SRUM section 3): one for the whole image, or one for each region.

Judges answer in many shapes: lines, markdown, tables, JSON, HTML-like tags, blocks parted by blank lines or rulers or
nothing. All are read; what cannot be read with certainty is a `ParseFailure` with its reason, never a number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from unified_rl.reward.reply_text import (
    BREAK,
    END,
    Problem,
    answer_of,
    bare_number,
    plain_text,
    read_number,
    settle,
    writable,
)

JSON_STARTS = 8  # brackets that are tried as the start of JSON


@dataclass(frozen=True)
class ParseFailure:
    """A score that the reply does not give, and why; fit for a record's `reason`."""

    reason: str


@dataclass(frozen=True)
class JudgeScore:
    """A score in -1..1 with what the judge named and said about it; both may be empty."""

    score: float
    object: str = ""
    reason: str = ""


@dataclass
class _Block:
    """What a reply says about one region. `region` is None where it names none, -1 where it names several or all."""

    region: int | None = None
    listed: bool = False  # numbered as an item of a list, without a word like region
    readings: list[float | Problem] = field(default_factory=list)
    object: str = ""
    reason: str = ""
    score_end: int = 0  # in the text, behind the label of the last score
    rest: str = ""  # what follows the region's number, up to the next label
    closed: bool = False  # what comes next is not about this region unless it says so


_QUALIFIERS = r"(?:(?:the|my|your|overall|final|global|local|region(?:al)?|layout|composition|total)[ ]+){0,4}"
_SCORE = re.compile(
    rf"\b{_QUALIFIERS}score\b"
    r"(?:(?: +(?:for|of))? *\(?(?:region|box|id|object)? *#?(?P<region>[0-9]{1,4})\)?(?= *[:=]))?"
    r"(?: *[(\[][^)\]\n]*[)\]](?= *[:=]))?(?: *(?::|=>?|->|→|\||is\b)|(?= +[+\-–]?\.?[0-9])|(?=\n))",
    re.IGNORECASE,
)
_OBJECT = re.compile(r"\b(?:(?:main|identified) +)?(?:object(?: +name)?|name|label) *[:=]", re.IGNORECASE)
_REASON = re.compile(r"\b(?:reason(?:ing)?|justification|explanation|rationale) *[:=]", re.IGNORECASE)
_REGION = re.compile(
    r"\b(?:(?:regions?|ids?)\b(?: +(?:id|number|no\.?))? *[#:=(\[]* *|box *#? *|(?P<object>object) *#?)"
    r"(?P<region>[0-9]{1,4})(?![0-9]|\.[0-9])(?P<more>(?: *(?:,|-|–|to|and|&|/) *#?[0-9]+(?![0-9]|\.[0-9]))*)",
    re.IGNORECASE,
)
_AFTER_REGION = re.compile(r" *(?:$|[:|;(\[\])\-–—=.]|(?:object|score)\b)", re.IGNORECASE | re.MULTILINE)
_LIST_NUMBER = re.compile(r"^[ \-•+]*[\[(]?#?(?P<region>[0-9]{1,4})[\]).:](?=\s|$)", re.MULTILINE)
_OF_THE_WHOLE = re.compile(r"overall|global|total|layout|composition", re.IGNORECASE)
_NOT_A_SCORE = re.compile(r"object|name|reason|size|count|number|coordinates|bbox|label|[0-9]", re.IGNORECASE)


def parse_global(reply: str, truncated: bool = False) -> JudgeScore | ParseFailure:
    """The score of the whole image.

    Args:
        reply: text of the judge, with or without its plan.
        truncated: the reply was stopped by its length limit, so a number at its end may lack digits.
    """
    answer = answer_of(reply)
    if isinstance(answer, Problem):
        return ParseFailure(answer.reason)
    blocks = _blocks(answer, truncated)
    value = settle([r for block in blocks for r in block.readings])
    if isinstance(value, Problem):
        return ParseFailure(value.reason)
    return JudgeScore(value, reason=next((b.reason for b in blocks if b.reason), ""))


def parse_regions(reply: str, count: int, truncated: bool = False) -> dict[int, JudgeScore | ParseFailure]:
    """The score of each of the regions 1..count, one entry for every region; arguments as for `parse_global`.

    Scores without a region's number count only where the blocks are as many as the regions: then the order decides.
    """
    answer = answer_of(reply)
    if isinstance(answer, Problem):
        return {region: ParseFailure(answer.reason) for region in range(1, count + 1)}
    blocks = [b for b in _blocks(answer, truncated) if b.readings or b.region is not None]
    remark = _number_regions(blocks, count)
    results: dict[int, JudgeScore | ParseFailure] = {}
    for region in range(1, count + 1):
        mine = [b for b in blocks if b.region == region]
        value = settle([r for block in mine for r in block.readings])
        if isinstance(value, Problem):
            reason = value.reason if any(b.readings for b in mine) else f"the reply holds no score for region {region}"
            results[region] = ParseFailure(reason + (remark if value.silent else ""))
        else:
            named = next((b.object for b in mine if b.object), "")
            results[region] = JudgeScore(value, named, next((b.reason for b in mine if b.reason), ""))
    return results


def _number_regions(blocks: list[_Block], count: int) -> str:
    """Give blocks without a number theirs where it is certain; returns a remark about scores that belong nowhere."""
    named = [b.region for b in blocks if b.region != -1]
    unsure = ""
    if None in named and len(named) == count and all(r in (None, i) for i, r in enumerate(named, 1)):
        for i, block in enumerate((b for b in blocks if b.region != -1), 1):
            block.region = i
    elif named[:1] == [None] and any(r is not None for r in named):
        # Each number may stand behind its score instead of before it: then all would be one off.
        unsure = "; its first score stands before any region's number"
    elif 0 in named and None not in named and sorted(named) == list(range(count)):
        for block in blocks:
            block.region += block.region != -1
    elif 0 in named:
        unsure = "; the reply numbers its regions from 0, but not one for one"
    if unsure:
        for block in blocks:
            block.region = -1
        return unsure
    lost = [b for b in blocks if b.readings and not (b.region and 1 <= b.region <= count)]
    names = sorted({b.region for b in lost if b.region and b.region > 0})
    which = f" (region {', '.join(map(str, names))} of {count})" if names else ""
    return f"; {len(lost)} of its scores cannot be assigned to a region{which}" if lost else ""


def _blocks(answer: str, truncated: bool) -> list[_Block]:
    found = _json_blocks(answer)
    if found is not None:
        return found
    text = _unroll_tables(plain_text(answer))
    bare = bare_number(text, truncated)
    if bare is not None:
        return [_Block(readings=[bare])]
    return _text_blocks(text, truncated)


def _text_blocks(text: str, truncated: bool) -> list[_Block]:
    """Blocks of a plain text, by walking over its labels in order."""
    tokens = _tokens(text)
    blocks = [_Block(closed=True)]
    stops = [len(text)]  # for each token, where the next label begins
    for start, _, kind, _ in tokens[:0:-1]:
        stops.append(stops[-1] if kind == "break" else start)
    for (_, end, kind, match), stop in zip(tokens, reversed(stops), strict=False):
        current = blocks[-1]
        if kind == "break":
            # A ruler or blank line below a heading does not part it from its block; one after the score does.
            current.closed = current.closed or bool(current.readings) or match.group() == END
        elif kind == "region" and _names_the_score_before(text, match, current):
            current.region, current.closed = _region_of(match), True
        elif kind in ("region", "listed"):
            # Behind a number at the very end of the text, digits may be missing; elsewhere they are not.
            rest = text[end:stop] + "\n" * (stop < len(text))
            blocks.append(_Block(_region_of(match), kind == "listed", rest=rest))
        elif kind == "score":
            if match["region"]:
                blocks.append(_Block(int(match["region"])))
            elif _OF_THE_WHOLE.search(match.group()) and (current.closed or current.region is None):
                blocks.append(_Block(-1))
            elif current.closed or (current.region is None and current.readings):
                blocks.append(_Block())
            blocks[-1].score_end = end
            blocks[-1].readings.append(read_number(text, end, truncated))
        elif kind == "object":
            if current.closed or current.object:
                blocks.append(_Block())
            blocks[-1].object = _field_text(text, end, stop)
        elif not current.reason:
            current.reason = _field_text(text, end, stop)
    for block in blocks:
        if not block.readings:
            block.readings += _unlabelled_score(block.rest, block.listed, truncated)
    return blocks


def _tokens(text: str) -> list[tuple[int, int, str, re.Match]]:
    """(start, end, kind, match) of the labels in a text, in order and without overlap."""
    found = [(m, "break") for m in re.finditer(rf"{END}|{BREAK}|\n *\n", text)]
    for pattern, kind in ((_SCORE, "score"), (_OBJECT, "object"), (_REASON, "reason")):
        found += [(m, kind) for m in pattern.finditer(text) if _starts_a_field(text, m.start())]
    regions = [(m, "region") for m in _REGION.finditer(text) if _names_a_region(text, m)]
    listed = [(m, "listed") for m in _LIST_NUMBER.finditer(text)]
    found += regions or (listed if _numbers_regions(text, listed) else [])
    tokens: list[tuple[int, int, str, re.Match]] = []
    for match, kind in sorted(found, key=lambda item: (item[0].start(), -item[0].end())):
        if not tokens or match.start() >= tokens[-1][1] or kind == "break":
            tokens.append((match.start(), match.end(), kind, match))
    return tokens


def _starts_a_field(text: str, start: int) -> bool:
    """Whether a label stands at the start of a line or behind a separator, not inside a sentence."""
    line = text.rfind("\n", 0, start) + 1
    prefix = text[max(line, start - 40) : start].rstrip()  # bounded, for replies that repeat themselves for pages
    named = re.search(r"(?:region|box|id|object) *#?[0-9]+$", prefix, re.IGNORECASE)
    return not prefix or prefix[-1] in "|,;.:()[]-–—•+" or named is not None


def _names_a_region(text: str, match: re.Match) -> bool:
    coordinates = len(re.findall(r"[0-9]+", match["more"])) >= 2 and "," in match["more"]
    if coordinates and not match.group().lower().startswith(("regions", "ids")):
        return False
    if not _starts_a_field(text, match.start()):
        return False
    if match["object"]:
        return text[match.end() : match.end() + 1] in tuple(":.)")
    line = text.rfind("\n", 0, match.start()) + 1
    return not text[line : match.start()].strip(" -•+") or _AFTER_REGION.match(text, match.end()) is not None


def _numbers_regions(text: str, listed: list[tuple[re.Match, str]]) -> bool:
    """Whether list numbers count regions, rather than fields or thoughts: they rise, and most items have one score."""
    numbers = [int(m["region"]) for m, _ in listed]
    if not numbers or any(b <= a for a, b in zip(numbers, numbers[1:], strict=False)):
        return False
    ends = [m.start() for m, _ in listed[1:]] + [len(text)]
    items = [text[m.end() : end] for (m, _), end in zip(listed, ends, strict=True)]
    labels = [sum(_starts_a_field(item, m.start()) for m in _SCORE.finditer(item)) for item in items]
    scores = [n or len(_unlabelled_score(item, True, False)) for n, item in zip(labels, items, strict=True)]
    heads = [_SCORE.match(item.lstrip()) is not None for item in items]
    fields = any(_REASON.match(item.lstrip()) for item in items) or any(heads) != all(heads)
    return not fields and scores[0] == 1 and max(scores) == 1 and 2 * sum(scores) >= len(scores)


def _names_the_score_before(text: str, match: re.Match, block: _Block) -> bool:
    """Whether the region comes behind its score, as in `Score: 0.8 (Region 1)`."""
    alone = block.region is None and block.readings and not block.closed
    same_line = "\n" not in text[block.score_end : match.start()]
    ends_it = re.compile(r"\)" if text[match.start() - 1] == "(" else r"[ .]*$", re.MULTILINE)
    return bool(alone and same_line and ends_it.match(text, match.end()))


def _region_of(match: re.Match) -> int:
    more = match.groupdict().get("more")
    return -1 if more else int(match["region"])


def _unlabelled_score(rest: str, listed: bool, truncated: bool) -> list[float | Problem]:
    """The number in `Region 1: 0.8`, `1. horse: 0.8`, `1. 0.8` or alone below `Region 1`, if there is one.

    `rest` is what follows the region's number.
    """
    line = rest.split("\n")[0]
    head, separator, tail = re.fullmatch(r"(?:(.*)([:=|]))?(.*)", line).groups(default="")
    head = re.sub(r"[\[(][^\])]*[\])]", "", head)  # coordinates
    if _NOT_A_SCORE.search(head) or (tail.strip() and not separator and not listed):
        return []
    if not re.fullmatch(r" *[\[(]?[+\-–]?[0-9.]*[\])]?[.,;]?", tail):
        return []
    reading = read_number(rest, len(line) - len(tail), truncated)
    return [] if isinstance(reading, Problem) and reading.silent else [reading]


def _field_text(text: str, start: int, stop: int) -> str:
    """Text of a field up to the end of its line or the next label."""
    return text[start:stop].strip().split("\n")[0].replace(BREAK, "").strip(" ,;|-")


def _unroll_tables(text: str) -> str:
    """Tables as blocks of `column: cell` lines, two-column tables without numbers in their head as `key: value`."""
    lines, table = [], []
    for line in [*text.split("\n"), ""]:
        if "|" in line:
            table.append([cell.strip() for cell in line.strip().strip("|").split("|")])
            continue
        lines += _unrolled([row for row in table if any(re.search(r"[^-: ]", cell) for cell in row)])
        table = []
        lines.append(line)
    return "\n".join(lines[:-1])


def _unrolled(rows: list[list[str]]) -> list[str]:
    head = rows[0] if rows else []
    if len(rows) < 2 or re.search("[0-9]", "".join(head)) or not any("score" in cell.lower() for cell in head):
        return [": ".join(row) if len(row) == 2 else " | ".join(row) for row in rows]
    numbering = [i for i, cell in enumerate(head) if re.fullmatch(r"#|no\.?|.*\b(?:id|region|box)\b.*", cell.lower())]
    lines = []
    for row in rows[1:]:
        cells = list(zip(head, row, strict=False))
        first = [f"Region {row[i]}" for i in numbering[:1] if i < len(row) and re.search("[0-9]", row[i])]
        named = [re.sub(r"(?i)^region +region", "Region", line) for line in first]
        lines += [END, *named, *(f"{name}: {cell}" for i, (name, cell) in enumerate(cells) if i not in numbering[:1])]
    return lines


def _json_blocks(answer: str) -> list[_Block] | None:
    """Blocks of a reply in JSON, alone or between words, cut off or not; None where it is none with scores."""
    for start in [m.start() for m in re.finditer(r"[{\[]", answer)][:JSON_STARTS]:
        if _SCORE.search(plain_text(answer[:start])):
            return None
        for text in (answer[start:], _closed(answer[start:])):
            try:
                content, end = json.JSONDecoder(object_pairs_hook=_unique).raw_decode(text)
                blocks = _walk(content, None)
            except (ValueError, RecursionError):
                continue
            # Words behind it are fine, another object or score is not: then the text as a whole is read.
            if blocks and not re.search(r"[{}]|score", text[end:], re.IGNORECASE):
                return blocks
    return None


def _unique(pairs: list[tuple[str, object]]) -> dict:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return dict(pairs)


def _closed(text: str) -> str:
    """JSON that was cut off, closed behind its last member that is certainly whole; empty where there is none."""
    whole = 0
    for i, character, stack in _structure(text):
        if stack and character in (stack[-1], ","):
            whole = i if character == "," else i + 1
    *_, (_, _, missing) = _structure(text[:whole] + " ")  # cut outside of strings, so the blank is the last of it
    return text[:whole] + "".join(reversed(missing))


def _structure(text: str) -> Iterator[tuple[int, str, list[str]]]:
    """(index, character, closing brackets expected before it) of JSON outside its strings; the list is reused."""
    stack: list[str] = []
    quoted = escaped = False
    for i, character in enumerate(text):
        if quoted:
            quoted, escaped = character != '"' or escaped, character == "\\" and not escaped
            continue
        yield i, character, stack
        quoted = character == '"'
        if character in "{[":
            stack.append("}" if character == "{" else "]")
        elif stack and character == stack[-1]:
            stack.pop()


def _walk(content: object, region: int | None) -> list[_Block]:
    """Blocks of the objects that hold a score, at any depth; `region` is the number that leads to `content`."""
    if isinstance(content, list):
        return [block for item in content for block in _walk(item, region)]
    if not isinstance(content, dict):
        return []
    keys = {key.lower().replace("_", " ").strip(): value for key, value in content.items()}
    for name in ("id", "region id", "region", "box id", "box"):
        number = re.fullmatch(r"(?:region|box|id)? *#?([0-9]{1,4})", str(keys.get(name)).strip().lower())
        region = int(number[1]) if number else region
    scores = [value for key, value in keys.items() if key == "score" or key.endswith(" score")]
    if scores:
        texts = [writable(str(keys.get(name) or "")) for name in ("object", "reason")]
        return [_Block(region, readings=[_json_score(v) for v in scores], object=texts[0], reason=texts[1])]
    blocks = []
    for key, value in keys.items():
        number = re.fullmatch(r"(?:region|box|id)? *#?([0-9]{1,4})", key)
        if number and isinstance(value, int | float | str):
            blocks.append(_Block(int(number[1]), readings=[_json_score(value)]))
        elif key == "scores" and isinstance(value, list) and not any(isinstance(v, dict) for v in value):
            blocks += [_Block(readings=[_json_score(v)]) for v in value]
        else:
            blocks += _walk(value, int(number[1]) if number else region)
    return blocks


def _json_score(value: object) -> float | Problem:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return Problem("no number follows the word score", silent=True)
    # Through the same door as text, so that "8/10" and 1.5 are refused alike.
    return read_number(f"{plain_text(str(value))} ", 0, False)
