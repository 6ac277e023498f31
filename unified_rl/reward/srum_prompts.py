"""What the judge is asked (SRUM, arXiv 2510.12784, tables 8 and 9): the paper's bands in our own words.

The answers to both questions, in either wording, are read by `srum_parse`. The whole-image score of the paper's "sample
reward" ablation is `local_question` with one box over the whole image.
"""

from __future__ import annotations

from collections.abc import Sequence

from unified_rl.reward.regions import Box

# full: scale, bands and form of the answer are explained, for a judge that has never been asked this before.
# brief: one line, for a small model that was taught the question and its answer.
WORDINGS = ("full", "brief")

# For a judge that is to plan before it answers; `srum_parse` reads only what follows the plan.
THINK_INSTRUCTION = """\
Before you answer, look closely and reason step by step between <think> and </think>. Write the answer after </think>, \
in the form that the question asks for, and put no scores of a draft there."""

GLOBAL_BANDS = """\
 1.0          every spatial demand of the prompt is met
 0.5 to  0.9  mostly met, with small slips
-0.4 to  0.4  neutral: the prompt demands no arrangement, or the arrangement is unremarkable
-0.9 to -0.5  wrong, or against what the prompt asks
-1.0          the opposite of what the prompt asks"""

LOCAL_BANDS = """\
 1.0          flawless, and exactly what the prompt asks for
 0.5 to  0.9  very good, with small flaws
-0.4 to  0.4  neutral: background that does no harm
-0.9 to -0.5  has nothing to do with the prompt and distracts, or belongs to it but is badly malformed
-1.0          contradicts the prompt"""


def global_question(prompt: str, wording: str = "full") -> str:
    """Question for one score of composition and arrangement, -1..1; the full wording asks for a reason as well.

    Raises:
        ValueError: a wording that is none of `WORDINGS`.
    """
    if is_brief(wording):
        return f'score the layout for "{_one_line(prompt)}"'
    return f"""\
You check pictures. The picture was drawn for this prompt: "{_one_line(prompt)}"

Judge only how the picture is composed: which things are there, how many, where they stand and how they relate to \
each other, compared with what the prompt asks. Leave beauty, style and small defects aside.

Choose a score from -1 to 1:
{GLOBAL_BANDS}

Answer with exactly two lines, for example one of these pairs:
Score: 0.95
Reason: The cup stands to the left of the plate, as the prompt says.
Score: -0.7
Reason: The prompt wants the bird above the house, but it sits on the ground in front of it.
Score: 0.2
Reason: The prompt asks for no arrangement, and the picture shows a plain one."""


def local_question(
    prompt: str, boxes: Sequence[Box], height: int, width: int, with_reason: bool = True, wording: str = "full"
) -> str:
    """Question for one score of relevance and quality, -1..1, for each of the regions 1..K.

    Args:
        prompt: the original prompt, not a rewritten one.
        boxes: K boxes in pixels of the picture as the judge sees it.
        height, width: size of that picture in pixels.
        with_reason: ask for a reason, which the paper's text demands and the released question leaves out. The brief
            wording never does.
        wording: one of `WORDINGS`; the brief one does not state the size.

    Raises:
        ValueError: no box, or another wording.
    """
    if not boxes:
        raise ValueError("a picture without regions has no local question")
    if is_brief(wording):
        numbered = " ".join(f"{i} ({b[0]}, {b[1]}, {b[2]}, {b[3]})" for i, b in enumerate(boxes, 1))
        return f'score the regions for "{_one_line(prompt)}": {numbered}'
    regions = "\n".join(f"Region {i}: from ({b[0]}, {b[1]}) to ({b[2]}, {b[3]})" for i, b in enumerate(boxes, 1))
    reason = "\nReason: <one short sentence>" if with_reason else ""
    return f"""\
You check pictures. The picture was drawn for this prompt: "{_one_line(prompt)}"

It is {width} pixels wide and {height} pixels high. Regions are given by their top left and bottom right corners \
(x, y), counted from the top left corner of the picture:
{regions}

For every region, name the main thing that it shows. Then give it one score from -1 to 1 for two things together: \
how much it belongs to the prompt, and how well it is drawn. Be as strict as you can; heavy distortion of something \
that the prompt asks for is worse than plain background.
{LOCAL_BANDS}

Answer for all {len(boxes)} regions in their order, each in this form and nothing else:
Region <number>
Object: <main thing>
Score: <number from -1 to 1>{reason}"""


def is_brief(wording: str) -> bool:
    """Whether a wording is the brief one; ValueError for none of `WORDINGS`."""
    if wording not in WORDINGS:
        raise ValueError(f"wording must be one of {', '.join(WORDINGS)}, not {wording!r}")
    return wording == "brief"


def _one_line(prompt: str) -> str:
    """The prompt without line breaks, so that it cannot look like another part of the question."""
    return " ".join(prompt.split())
