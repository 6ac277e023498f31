"""Base against tuned weights, score by score: `python -m unified_rl.evaluation.compare RUN`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from unified_rl.config import load_run_config
from unified_rl.evaluation.folder import evaluated_iterations, require_scores
from unified_rl.evaluation.scoring import Difference, EvaluationError, compare_scores
from unified_rl.manifests import store
from unified_rl.runtime import EXIT_OK, command_parser, run_stage


def compare(run: Path, iteration: int | None = None) -> list[Difference]:
    """Rows of the comparison of the base with the weights after `iteration` iterations (default: the last evaluated).

    Raises:
        EvaluationError: an evaluation is missing, or the two do not belong together.
    """
    config = load_run_config(run)
    base = require_scores(run, 0)
    done = [k for k in evaluated_iterations(run) if k > 0]
    if iteration is None and not done:
        raise EvaluationError(
            f"{run} has no evaluation of trained weights: run "
            f"`python -m unified_rl.evaluation --run {run} --iteration {config.iterations}`"
        )
    tuned = require_scores(run, done[-1] if iteration is None else iteration)
    return compare_scores(base, tuned, config.evaluate.bootstrap, config.seed)


def table(rows: list[Difference], control: dict | None = None) -> str:
    """Aligned text; `control` is a stored interval {"mean", "low", "high"} for the change of `overall`."""
    header = ["", "base", "95 %", "tuned", "95 %", "change", "95 %"] + (["shuffled control"] if control else [])
    lines = [header]
    for row in rows:
        cells = [label_of(row.name)]
        for value, (low, high) in ((row.base, row.base_interval), (row.tuned, row.tuned_interval)):
            cells += [f"{value:.3f}", f"{low:.3f}..{high:.3f}"]
        cells += [f"{row.change:+.3f}", f"{row.low:+.3f}..{row.high:+.3f}"]
        if control:
            cells.append(interval(control) if row.name == "overall" else "")
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def interval(value: dict) -> str:
    """`+0.123 (+0.100 .. +0.150)`, without the interval where there is none."""
    if value.get("low") is None:
        return f"{value['mean']:+.3f}"
    return f"{value['mean']:+.3f} ({value['low']:+.3f} .. {value['high']:+.3f})"


def label_of(name: str) -> str:
    """A score's name for people."""
    fixed = {
        "best_of_g": "best of G by the judge",
        "reward_mean": "frozen judge's reward",
        "overall": "drawing, overall",
        "framed_answering": "answers in all framings",
    }
    for kind, label in (("question_answering/", "  answers: "), ("framed_answering/", "  in all framings: ")):
        name = name.replace(kind, label)
    return fixed.get(name, name.replace("_", " "))


def main(argv: list[str] | None = None) -> int:
    """Print the table; `--json FILE` stores the rows."""
    module = "unified_rl.evaluation.compare"
    parser = command_parser(module, __doc__, f"python -m {module} runs/demo")
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--iteration", type=int, metavar="K", help="after K iterations; default: last evaluated")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where to store the rows; default RUN/comparison.json"
    )
    arguments = parser.parse_args(argv)
    rows = compare(arguments.run, arguments.iteration)
    target = arguments.json or arguments.run / "comparison.json"
    store(target, (json.dumps([asdict(r) for r in rows], indent=1) + "\n").encode())
    print(table(rows))
    return EXIT_OK


if __name__ == "__main__":
    run_stage(main)
