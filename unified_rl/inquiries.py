"""The records of Ask-Solve-Generate's understanding iterations: questions about an image, and what they earned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from unified_rl.manifests import is_count
from unified_rl.record_parts import (
    STATUSES,
    Record,
    Source,
    check_image_id,
    check_tensors,
    is_finite,
    is_unicode,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

INQUIRY_TENSORS = {
    "proposer_ids": "int [K, P]", "proposer_log_probs": "float [K, P]", "proposer_lengths": "int [K]",
    "greedy_ids": "int [K, E]", "greedy_entropies": "float [K, E]", "greedy_lengths": "int [K]",
    "answer_ids": "int [K, N, A]", "answer_log_probs": "float [K, N, A]", "answer_lengths": "int [K, N]",
}  # fmt: skip
# Of one question of an inquiry: its texts, what was stopped by a length limit, and lists of texts or of such marks.
INQUIRY_TEXTS = ("task", "reply", "question", "skipped", "greedy")
INQUIRY_MARKS = ("truncated", "greedy_truncated")
INQUIRY_LISTS = {"greedy_pieces": str, "answers": str, "answers_truncated": bool}


@dataclass(eq=False)
class InquiryRecord(Record):
    """The Proposer's K questions about one image and the Solver's replies (Ask-Solve-Generate).

    Each of `questions` has `task` (what the Proposer was asked), `reply` and whether it was `truncated`, `question` as
    read from it or else `skipped` with the reason; of the Solver's greedy reply `greedy`, its tokens one by one
    (`greedy_pieces`) and `greedy_truncated`; and the N replies `answers`, one a framing, with `answers_truncated`.
    A skipped question was not answered: `greedy` and the lists are empty.

    `tensors` have the tokens of all replies (INQUIRY_TENSORS) with log-probs or entropies as `rollout_text` gives them.
    Padding is id 0 and value 0, the lengths say where it begins; what was not answered has length 0.
    """

    SCHEMA: ClassVar[int] = 1
    MEMBERS: ClassVar[tuple[str, ...]] = ("json", "png", "safetensors")
    FIELDS: ClassVar[frozenset[str]] = frozenset(("image_id", "seed", "policy_version", "sampling", "questions"))

    image_id: str
    seed: int
    policy_version: str
    sampling: dict
    image: np.ndarray
    questions: list[dict]
    tensors: dict[str, torch.Tensor]

    @property
    def key(self) -> str:
        """Key of the inquiry in its shard: the image's."""
        return self.image_id

    def check(self, source: Source) -> None:
        """Raise RecordError where the record breaks the contract."""
        content = self.content()
        check_image_id(source, content)
        source.check(is_count(self.seed) and self.seed < 2**63, f"seed {self.seed!r} is not in 0..2**63-1")
        source.text(content, "policy_version")
        source.mapping(content, "sampling")
        source.check(set(self.tensors) == set(INQUIRY_TENSORS), f"tensors must be {', '.join(INQUIRY_TENSORS)}")
        check_tensors(source, self.tensors, INQUIRY_TENSORS)
        for kind in ("proposer", "greedy", "answer"):
            lengths, width = self.tensors[f"{kind}_lengths"], self.tensors[f"{kind}_ids"].shape[-1]
            fits = bool(((lengths >= 0) & (lengths <= width)).all())
            source.check(fits, f"tensor {kind}_lengths has a value outside 0..{width}")
        count = len(self.tensors["proposer_ids"])
        source.check(isinstance(self.questions, list) and len(self.questions) == count, f"must have {count} questions")
        for number in range(count):
            self._check_question(source, number)

    def _check_question(self, source: Source, number: int) -> None:
        asked = self.questions[number]
        names = {*INQUIRY_TEXTS, *INQUIRY_MARKS, *INQUIRY_LISTS}
        source.check(isinstance(asked, dict) and set(asked) == names, f"question {number} must have {sorted(names)}")
        for name in INQUIRY_TEXTS:
            source.text(asked, name, empty=name != "task")
        for name in INQUIRY_MARKS:
            source.check(isinstance(asked[name], bool), f"question {number}: {name} is neither true nor false")
        for name, kind in INQUIRY_LISTS.items():
            entries = asked[name]
            good = isinstance(entries, list) and all(isinstance(e, kind) for e in entries)
            source.check(good, f"question {number}: {name} must be a list of {kind.__name__}")
            source.check(kind is bool or all(map(is_unicode, entries)), f"question {number}: {name} is no Unicode text")
        named = bool(asked["question"].strip()) != bool(asked["skipped"].strip())
        source.check(named, f"question {number} needs either a question or the reason why there is none")
        greedy, answers = (self.tensors[name][number] for name in ("greedy_lengths", "answer_lengths"))
        replies = 0 if asked["skipped"] else len(answers)
        found = [len(asked["greedy_pieces"]), len(asked["answers"]), len(asked["answers_truncated"])]
        wanted = [int(greedy), replies, replies]
        source.check(found == wanted, f"question {number}: {found} pieces, answers and marks, expected {wanted}")
        answered = int(greedy) > 0 and bool((answers > 0).all())
        silent = int(greedy) == 0 and not bool(answers.any())
        source.check(silent if asked["skipped"] else answered, f"question {number}: lengths do not fit its state")


QUESTION_NUMBERS = ("vote_entropy", "token_entropy", "rank", "agreement")
QUESTION_SCORE = frozenset(
    ("question", "skipped", "reward", "answers", "votes", "majority", "bucket", *QUESTION_NUMBERS)
)


@dataclass(eq=False)
class InquiryReward(Record):
    """What the questions about one image earned. A score that is not there is a reason, never a number.

    Each of `questions`, in the order of the inquiry, has its `question`, or `skipped` with the reason why it has no
    score, or both where the Solver's answers could not be read; `reward` of the Proposer: null for an unread answer,
    but a number for a reply without a question, which is the Proposer's doing; `answers`, normalised, null where
    unreadable; and what they say together: `votes`, `majority`, `bucket`, `vote_entropy`, `token_entropy`, `rank`,
    `agreement` (empty or null without a score). The Solver learns from question number `chosen`, each of whose answers
    earned one of `solver_rewards` (null for none, where unreadable); -1 for none, with the reason in `why_none`.
    """

    SCHEMA: ClassVar[int] = 1
    MEMBERS: ClassVar[tuple[str, ...]] = ("json",)
    FIELDS: ClassVar[frozenset[str]] = frozenset(
        ("image_id", "policy_version", "status", "reason", "questions", "chosen", "why_none", "solver_rewards")
    )

    image_id: str
    policy_version: str
    status: str
    reason: str
    questions: list[dict]
    chosen: int
    why_none: str
    solver_rewards: list[float | None]

    @property
    def key(self) -> str:
        """Key of the score in its shard: the image's."""
        return self.image_id

    def check(self, source: Source) -> None:
        """Raise RecordError where the record breaks the contract."""
        content = self.content()
        check_image_id(source, content)
        source.text(content, "policy_version")
        source.check(self.status in STATUSES, f"status {self.status!r} is not one of {', '.join(STATUSES)}")
        source.text(content, "reason", empty=self.status == "ok")
        source.check(isinstance(self.questions, list) and bool(self.questions), "questions must be a list, not empty")
        for number, asked in enumerate(self.questions):
            self._check_question(source, number, asked)
        source.text(content, "why_none", empty=self.chosen != -1)
        whole = isinstance(self.chosen, int) and -1 <= self.chosen < len(self.questions)
        source.check(whole, f"chosen {self.chosen!r} is no question of {len(self.questions)}")
        earned = isinstance(self.solver_rewards, list) and all(r is None or is_finite(r) for r in self.solver_rewards)
        source.check(earned, "solver_rewards must be a list of finite numbers and null")
        answers = [] if self.chosen < 0 else self.questions[self.chosen]["answers"]
        fits = len(answers) == len(self.solver_rewards)
        fits = fits and all(a is None or r is not None for a, r in zip(answers, self.solver_rewards, strict=True))
        source.check(fits, "solver_rewards must have a number for each readable answer of the chosen question")

    def _check_question(self, source: Source, number: int, asked: dict) -> None:
        where = f"question {number}"
        source.check(
            isinstance(asked, dict) and set(asked) == QUESTION_SCORE, f"{where} must have {sorted(QUESTION_SCORE)}"
        )
        for name in ("question", "skipped", "majority", "bucket"):
            source.text(asked, name, empty=True)
        source.check(asked["reward"] is None or is_finite(asked["reward"]), f"{where}: its reward is no finite number")
        answers, votes = asked["answers"], source.mapping(asked, "votes")
        source.check(isinstance(answers, list), f"{where}: answers must be a list")
        source.check(all(a is None or isinstance(a, str) for a in answers), f"{where}: an answer is no text")
        scored = not asked["skipped"]
        numbers = [asked[name] for name in (*QUESTION_NUMBERS, "reward")]
        source.check(not scored or all(map(is_finite, numbers)), f"{where} has a score that is no finite number")
        source.check(scored or not any(is_finite(n) for n in numbers[:-1]), f"{where} is skipped but has a score")
        counted = {a: answers.count(a) for a in answers if a is not None}
        source.check(votes == (counted if scored else {}), f"{where}: votes are not those of its answers")
