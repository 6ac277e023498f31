"""`RUN/summary.json` and the closing table: `python -m unified_rl.evaluation.summary --run RUN`."""

from __future__ import annotations

import json
from pathlib import Path

from unified_rl.config import ASSETS, RunConfig, load_run_config
from unified_rl.evaluation.compare import compare, interval, table
from unified_rl.evaluation.folder import require_scores
from unified_rl.evaluation.scoring import EvaluationError, by_category
from unified_rl.ledger import Run
from unified_rl.manifests import store
from unified_rl.report.timing import seconds_by_stage
from unified_rl.runtime import EXIT_OK, command_parser, run_stage


def stored_evidence(config: RunConfig) -> dict | None:
    """Result of the learning experiment with its controls that ships with the package, for this method and backbone."""
    path = ASSETS / "evidence" / f"{config.reward.method}-{config.backbone.family}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def reported(scores: dict) -> dict[str, float]:
    """The scores of one checkpoint that a summary holds."""
    names = ["overall", *by_category(scores["prompts"]), "caption_ranking", "question_answering", "framed_answering"]
    return {name: scores[name] for name in names if name in scores}


def loop_seconds(run: Path) -> float:
    """Wall-clock seconds of `launch/loop.sh`, over all the times it ran, process starts included.

    Without its record (stages started by hand) the seconds that the stages measured themselves.
    """
    path = run / "loop_seconds"
    if path.is_file():
        return float(sum(int(line) for line in path.read_text().split()))
    return round(sum(seconds_by_stage(run).values()), 3)


def summarize(run: Run, setup_seconds: float | None = None) -> dict:
    """Content of summary.json.

    Raises:
        EvaluationError, LedgerError: an evaluation or a reward stage is not committed.
    """
    return {
        "base": reported(require_scores(run.path, 0)),
        "tuned": reported(require_scores(run.path, run.config.iterations)),
        "reward": {  # mean over the images
            name: run.require_manifest(iteration, "reward").extra["reward_mean"]
            for name, iteration in (("first", 0), ("last", run.config.iterations - 1))
        },
        "loop_seconds": loop_seconds(run.path),
        "setup_seconds": setup_seconds,
        "iterations": run.config.iterations,
        "ranks": run.config.train.ranks,
    }


def closing_text(run: Run, summary: dict) -> str:
    """The table, the stored control beside it, and where to look next."""
    evidence = stored_evidence(run.config)
    control = evidence["controls"]["shuffled"] if evidence else None
    lines = [table(compare(run.path, run.config.iterations), control), ""]
    if evidence:
        seeds = len(evidence["gain"]["per_seed"])
        lines.append(
            f"stored result over {seeds} seeds: gain {interval(evidence['gain'])}; shuffled {interval(control)}"
        )
    reward = summary["reward"]
    lines.append(f"reward while training: {reward['first']:.4f} -> {reward['last']:.4f}")
    lines.append(f"{summary['iterations']} iterations on {summary['ranks']} ranks: {summary['loop_seconds']:.0f} s")
    for label, name in (
        ("picture", "before_after.png"),
        ("report", "report.html"),
        ("summary", "summary.json"),
    ):
        lines.append(f"{label + ':':13}{run.path / name}")
    lines.append(f"{'TensorBoard:':13}tensorboard --logdir {run.path / 'tensorboard'}")
    return "\n".join(lines)


def read_setup_seconds(path: Path | None) -> float | None:
    """The number in a file that the set-up wrote; None without a file."""
    if path is None or not path.is_file():
        return None
    try:
        return float(path.read_text())
    except ValueError:
        raise EvaluationError(f"{path} does not hold a number of seconds") from None


def main(argv: list[str] | None = None) -> int:
    """Write summary.json and print the closing text."""
    module = "unified_rl.evaluation.summary"
    parser = command_parser(module, __doc__, f"python -m {module} --run runs/demo")
    parser.add_argument("--run", type=Path, required=True, metavar="RUN")
    parser.add_argument("--setup-seconds-file", type=Path, metavar="F", help="file with the seconds that set-up took")
    arguments = parser.parse_args(argv)
    run = Run(arguments.run, load_run_config(arguments.run))
    summary = summarize(run, read_setup_seconds(arguments.setup_seconds_file))
    store(run.path / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    print(closing_text(run, summary))
    return EXIT_OK


if __name__ == "__main__":
    run_stage(main)
