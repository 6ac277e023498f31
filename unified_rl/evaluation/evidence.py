"""The learning claim over several seeds, with its controls: one summary.json from finished run folders.

Reads `OUT/main-SEED` and `OUT/shuffled-SEED`, SEED = 1..N, made by `launch/evidence.sh`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from unified_rl.config import load_run_config
from unified_rl.evaluation.compare import interval
from unified_rl.evaluation.folder import require_scores
from unified_rl.evaluation.intervals import mean_interval
from unified_rl.evaluation.scoring import EvaluationError, check_comparable
from unified_rl.manifests import store
from unified_rl.runtime import EXIT_OK, run_stage

CONTROLS = ("shuffled",)
UNDERSTANDING = ("caption_ranking", "question_answering")


def read_pair(run: Path, method: str, backbone: str, control: str) -> tuple[dict, dict]:
    """Scores before and after one finished run.

    Raises:
        EvaluationError: the run is missing, unfinished, or not what its name says; the message names it.
    """
    if not (run / "config.yaml").is_file():
        raise EvaluationError(f"run {run} is missing: make it with `make evidence METHOD={method} BACKBONE={backbone}`")
    config = load_run_config(run)
    found = (config.reward.method, config.backbone.family, config.policy.control)
    if found != (method, backbone, control):
        raise EvaluationError(f"run {run} is {' '.join(found)}, expected {method} {backbone} {control}")
    base, tuned = require_scores(run, 0), require_scores(run, config.iterations)
    check_comparable(base, tuned)
    return base, tuned


def changes(pairs: list[tuple[dict, dict]], name: str) -> dict:
    """Mean change of a score over the runs, with its interval."""
    missing = [scores["policy_version"] for pair in pairs for scores in pair if name not in scores]
    if missing:
        raise EvaluationError(f"the evaluation of weights {missing[0]} has no score {name}")
    return mean_interval([tuned[name] - base[name] for base, tuned in pairs])


def evidence(out: Path, method: str, backbone: str, seeds: int) -> dict:
    """Content of the evidence summary.

    `gain` and `controls` are changes of `overall`. `best_of_g` is what choosing among the base model's G images with
    the same judge gains without any training.
    """
    runs = {
        kind: [
            read_pair(out / f"{kind}-{seed}", method, backbone, "none" if kind == "main" else kind)
            for seed in range(1, seeds + 1)
        ]
        for kind in ("main", *CONTROLS)
    }
    main_runs = runs["main"]
    understood = [name for name in UNDERSTANDING if name in main_runs[0][0]]
    return {
        "gain": changes(main_runs, "overall"),
        "controls": {kind: changes(runs[kind], "overall") for kind in CONTROLS},
        "understanding_change": {name: changes(main_runs, name) for name in understood},
        "best_of_g": mean_interval([base["best_of_g"] - base["overall"] for base, _ in main_runs]),
        "base": mean_interval([base["overall"] for base, _ in main_runs]),
        "tuned": mean_interval([tuned["overall"] for _, tuned in main_runs]),
        "reward_change": changes(main_runs, "reward_mean"),
    }


def text(result: dict) -> str:
    """One line for each interval."""
    rows = [("gain", result["gain"])]
    rows += [(f"control: {name}", value) for name, value in result["controls"].items()]
    rows += [(f"change of {name.replace('_', ' ')}", value) for name, value in result["understanding_change"].items()]
    rows += [
        ("best of G, untrained", result["best_of_g"]),
        ("change of the frozen judge's reward", result["reward_change"]),
    ]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:{width}}  {interval(value)}" for label, value in rows)


def main(argv: list[str] | None = None) -> int:
    """Write OUT/summary.json and print it as text."""
    parser = argparse.ArgumentParser(
        prog="python -m unified_rl.evaluation.evidence", description=__doc__,
        epilog="example:\n  python -m unified_rl.evaluation.evidence --method gvu --backbone janus --seeds 3 "
        "--out runs/evidence/gvu-janus",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--method", required=True)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--seeds", type=int, required=True, metavar="N")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1:
        parser.error("--seeds must be at least 1")
    result = evidence(arguments.out, arguments.method, arguments.backbone, arguments.seeds)
    store(arguments.out / "summary.json", (json.dumps(result, indent=1) + "\n").encode())
    print(text(result))
    return EXIT_OK


if __name__ == "__main__":
    run_stage(main)
