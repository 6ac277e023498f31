"""What Proposer and Solver are asked in Ask-Solve-Generate (arXiv 2606.27376): the paper's tasks in our own words.

Questions and drawing tasks are read by `proposals`, answers by `answers`. Wordings as for SRUM: `full` explains, for a
model that was never asked this before; `brief` is one line, for a small model that was taught it.
"""

from __future__ import annotations

from unified_rl.reward.srum_prompts import is_brief

DIFFICULTIES = {
    "medium": "Someone should need two observations to answer it, for example a place and a colour.",
    "hard": "Someone should need to search the picture: small, distant, partly hidden or countable things, or a "
    "comparison of several of them.",
}

# One question, N ways to put it. The first is the canonical one, for the greedy answer whose entropy is measured.
FRAMINGS = {
    "full": (
        "Answer a question about the picture. Nothing but the picture counts.",
        "Take your time to look, then answer from what can be seen.",
        "You report facts about pictures. Give the fact that is asked for.",
        "Go over the whole picture first. Then give a direct answer.",
        "You inspect pictures and say only what they bear out.",
        "Give a short answer that anybody with the picture could confirm.",
        "Find the part of the picture that decides the question, and answer from it.",
    ),
    # Not those that the small models were taught: a public model has not been taught its framings either.
    "brief": (
        "", "question: ", "answer: ", "for this picture: ", "study the scene. ", "answer in one word. ",
        "look at the image and answer. ",
    ),
}  # fmt: skip

_ANSWER_RULES = """\
Answer with the bare fact in one to five words: no sentence, no explanation, no "or". Write a count as a whole number. \
Never answer with a vague amount, and never that it cannot be told: if in doubt, give the likeliest concrete answer.
Put the answer between tags, as in <answer>dark green</answer>, <answer>4</answer> or <answer>no</answer>."""


def proposer_question(difficulty: str | None = None, wording: str = "full") -> str:
    """Asks the Proposer for one question about a picture; `difficulty` is one of DIFFICULTIES, or None for any.

    Raises:
        ValueError: another difficulty or wording.
    """
    if difficulty is not None and difficulty not in DIFFICULTIES:
        raise ValueError(f"difficulty must be one of {', '.join(DIFFICULTIES)}, not {difficulty!r}")
    if is_brief(wording):
        return f"ask a {difficulty} question" if difficulty else "ask a question"
    wanted = f"\n- {DIFFICULTIES[difficulty]}" if difficulty else ""
    return f"""\
Write one question about this picture that tests how well someone reads it.

- It has exactly one right answer of a few words, which the picture alone decides.
- It is about a detail: where things are and what they touch, how many there are, small writing, material or texture, \
a part of a thing, what state it is in, or how two things compare. What is largest or in the middle is too easy.
- It does not name possible answers, does not give its own answer away, and is not to be answered with yes or no.
- It has at most 20 words.{wanted}

Answer with a single line that begins with "Question:" and goes on with the question. Do not answer it."""


def solver_question(question: str, framing: int = 0, wording: str = "full") -> str:
    """A question in framing number 0, 1, ...; the seven that there are come in turn.

    Raises:
        ValueError: a negative number, or another wording.
    """
    brief = is_brief(wording)
    framings = FRAMINGS[wording]
    if framing < 0:
        raise ValueError(f"a framing is a number from 0, not {framing!r}")
    line, before = " ".join(question.split()), framings[framing % len(framings)]
    return f"{before}{line}" if brief else f"{before}\n{_ANSWER_RULES}\n\nQuestion: {line}"


def drawing_task_question(pairs: int = 3, rejected: tuple[str, str] | None = None, wording: str = "full") -> str:
    """Asks the Proposer for a prompt to draw from, and for questions that check a drawing of it.

    Args:
        pairs: how many questions with answers.
        rejected: an earlier prompt that was no good, and why.

    Raises:
        ValueError: no pairs, or another wording.
    """
    if pairs < 1:
        raise ValueError(f"a drawing task needs at least one question, not {pairs!r}")
    if is_brief(wording):
        return f"write a drawing task with {pairs} questions"
    again = ""
    if rejected:
        prompt, reason = (" ".join(part.split()) for part in rejected)
        again = f'\n\nAn earlier attempt, "{prompt}", was turned down ({reason}). Write a different one.'
    return f"""\
Turn this picture into a task for a painter who cannot see it: a prompt to paint from, and {pairs} questions that show \
afterwards whether the painting is right.

- The prompt is one plain statement of what is to be seen. It does not mention a picture.
- Every question asks for a fact that the prompt states and this picture shows, such as a number, a colour, a place or \
a state. It takes at least two observations to answer, and its one right answer has one to six words.
- No question repeats another, and not all of them are to be answered with yes or no.

Write the prompt on a line that begins with "Prompt:". Then write each question on a line that begins with "Question:" \
and below it its answer on a line that begins with "Answer:". Write nothing else.{again}"""


def caption_question(wording: str = "full") -> str:
    """Asks the Solver for the caption that is compared with the prompt."""
    if is_brief(wording):
        return "Describe the image in detail."
    return "Say in one short and complete sentence what this picture shows."
