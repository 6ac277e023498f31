"""Why something has no score in Ask-Solve-Generate: a failed or skipped score is a state with a reason, no number."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class SkipReason(str, Enum):
    """What went wrong, or why nothing is done; the values are names in metrics."""

    # reading what a role wrote
    EMPTY_REPLY = "empty_reply"
    CUT_OFF = "cut_off"
    NO_ANSWER = "no_answer"
    SEVERAL_ANSWERS = "several_answers"
    ANSWER_TOO_LONG = "answer_too_long"
    NO_QUESTION = "no_question"
    COMPOUND_QUESTION = "compound_question"
    QUESTION_TOO_LONG = "question_too_long"
    REPEATED_QUESTION = "repeated_question"
    TOO_MANY_QUESTIONS = "too_many_questions"
    NO_PROMPT = "no_prompt"
    SEVERAL_PROMPTS = "several_prompts"
    PROMPT_TOO_LONG = "prompt_too_long"
    TOO_FEW_PAIRS = "too_few_pairs"
    # scoring it
    TOO_FEW_ANSWERS = "too_few_answers"
    NO_ANSWER_TOKENS = "no_answer_tokens"
    BAD_ENTROPY = "bad_entropy"
    UNRELIABLE_REFERENCE = "unreliable_reference"
    BAD_SIMILARITY = "bad_similarity"
    # choosing what to train on
    TOO_EASY = "too_easy"
    TOO_DIVIDED = "too_divided"
    TOO_UNSURE = "too_unsure"
    LOW_QUALITY = "low_quality"


@dataclass(frozen=True)
class Skipped:
    """In the place of a result: why there is none; `text` is fit for a record's `reason`."""

    reason: SkipReason
    detail: str = ""

    @property
    def text(self) -> str:
        """Reason and detail in one line."""
        return f"{self.reason.value}: {self.detail}" if self.detail else self.reason.value


def count_skips(outcomes: Iterable[object]) -> dict[str, int]:
    """How often each reason occurs among results of any type; every reason is listed, also those that do not."""
    counts = {reason.value: 0 for reason in SkipReason}
    for outcome in outcomes:
        if isinstance(outcome, Skipped):
            counts[outcome.reason.value] += 1
    return counts
