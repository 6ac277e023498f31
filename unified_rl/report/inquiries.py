"""What Ask-Solve-Generate's roles wrote, as Markdown tables: questions with their votes, drawing tasks with scores."""

from __future__ import annotations

from unified_rl.inquiries import InquiryReward
from unified_rl.records import RewardRecord, RolloutRecord
from unified_rl.report.truth import Truth
from unified_rl.shards import read_records

SHOWN_QUESTIONS = 48
SHOWN_TASKS = 16


def questions_table(truth: Truth, iteration: int) -> str:
    """The first questions of an understanding iteration: votes, entropy and its rank, verdict, reward."""
    manifest = truth.manifests[iteration, "reward"]
    folder = truth.run.stage_folder(iteration, "reward")
    rows = []
    for record in read_records(folder, manifest.shards[:1], InquiryReward):
        for number, asked in enumerate(record.questions):
            votes = ", ".join(f"{answer} {n}" for answer, n in sorted(asked["votes"].items(), key=lambda v: -v[1]))
            verdict = asked["skipped"] or asked["bucket"] + (", chosen" if number == record.chosen else "")
            numbers = [asked[name] for name in ("token_entropy", "rank", "agreement", "reward")]
            rows.append([record.image_id, asked["question"], votes, *map(_shown, numbers), verdict])
    header = ["image", "question", "votes", "token entropy", "rank", "agreement", "reward", "verdict"]
    return markdown(header, rows[:SHOWN_QUESTIONS])


def tasks_table(rollouts: list[RolloutRecord], rewards: dict[str, RewardRecord]) -> str:
    """Drawing tasks with the questions that check them, and the rewards of their drawings."""
    groups: dict[str, list[RolloutRecord]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.prompt.prompt_id, []).append(rollout)
    rows = []
    for group in list(groups.values())[:SHOWN_TASKS]:
        metadata = group[0].prompt.metadata
        pairs = "; ".join(f"{question} {reference}" for question, reference in metadata["pairs"])
        scores = [rewards[r.key] for r in group if r.key in rewards]
        earned = " ".join(_shown(s.reward) or s.reason for s in scores)
        fidelity = " ".join(_shown(s.components.get("fidelity")) for s in scores)
        task = group[0].prompt
        rows.append([metadata["image_id"], task.text, pairs, _shown(metadata["quality"]), fidelity, earned])
    return markdown(["image", "prompt", "questions and references", "quality", "fidelity", "rewards"], rows)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; what a model wrote cannot leave its cell."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[" ".join(cell.replace("|", "\\|").replace("<", "&lt;").split()) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
