"""Inquiries made by hand: what a Proposer asked and a Solver answered, without a model."""

import numpy as np
import torch

from unified_rl.inquiries import InquiryRecord

N = 7
TASK = "ask a question"


def asked(question="what color is the star?", answers=("red",) * N, greedy="red", entropies=(0.5, 0.1), **changes):
    """One question; its greedy reply has one token for its text and one that ends the turn."""
    entry = {
        "task": TASK, "reply": f"Question: {question}", "truncated": False, "question": question, "skipped": "",
        "greedy": greedy, "greedy_pieces": [greedy, ""], "greedy_truncated": False,
        "answers": list(answers), "answers_truncated": [False] * len(answers),
    }  # fmt: skip
    return {**entry, "entropies": list(entropies), **changes}


def unasked(reason="no_question"):
    """A reply without a question."""
    nothing = {"question": "", "skipped": reason, "greedy": "", "greedy_pieces": []}
    return asked(answers=(), entropies=(), **nothing)


def inquiry(image_id, *entries, answers=N):
    """A record of questions from `asked` and `unasked`."""
    count = len(entries)
    greedy = torch.zeros(count, 2)
    for row, entry in enumerate(entries):
        greedy[row, : len(entry["entropies"])] = torch.tensor(entry["entropies"])
    there = torch.tensor([bool(e["question"]) for e in entries]).int()
    tensors = {
        "proposer_ids": torch.ones(count, 3).int(), "proposer_log_probs": torch.full((count, 3), -0.5),
        "proposer_lengths": torch.full((count,), 3).int(),
        "greedy_ids": torch.ones(count, 2).int(), "greedy_entropies": greedy, "greedy_lengths": 2 * there,
        "answer_ids": torch.ones(count, answers, 1).int(), "answer_log_probs": torch.full((count, answers, 1), -0.1),
        "answer_lengths": there[:, None].repeat(1, answers),
    }  # fmt: skip
    image = np.full((4, 4, 3), sum(map(ord, image_id)) % 256, np.uint8)
    questions = [{name: value for name, value in e.items() if name != "entropies"} for e in entries]
    return InquiryRecord(image_id, 5, "base", {"wording": "brief"}, image, questions, tensors)
