"""The learning claim over several seeds, with its controls: one summary.json from finished run folders.

Reads `OUT/main-SEED` and `OUT/CONTROL-SEED`, SEED = 1..N, made by `launch/evidence.sh`; `--list` says which those are.
"""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import OmegaConf

from unified_rl.config import load_run_config
from unified_rl.evaluation.compare import interval
from unified_rl.evaluation.folder import require_scores
from unified_rl.evaluation.intervals import mean_interval
from unified_rl.evaluation.scoring import EvaluationError, check_comparable
from unified_rl.manifests import store
from unified_rl.runtime import EXIT_OK, command_parser, run_stage

# What a control changes in the recipe.
CONTROLS = {
    "shuffled": {"policy.control": "shuffled"},
    "constant": {"policy.control": "constant"},
    "no_local": {"reward.srum.use_local": "false"},
    "no_global": {"reward.srum.use_global": "false"},
    "understanding_only": {"self_consistency.generation": "0"},
    "generation_only": {"self_consistency.understanding": "0"},
    "no_token_entropy": {"self_consistency.token_entropy": "false"},
    "fixed_proposer": {"self_consistency.train_proposer": "false"},
}
CONTROLS_OF = {
    "gvu": ("shuffled",),
    "srum": ("shuffled", "constant", "no_local", "no_global"),
    "self_consistency": (
        "shuffled", "understanding_only", "generation_only", "no_token_entropy", "fixed_proposer",
    ),
}  # fmt: skip
FRAMED = "framed_answering"  # answers sampled as the Solver's are; measured where there is a Solver
UNDERSTANDING = ("caption_ranking", "question_answering", FRAMED)


def runs_of(method: str, seeds: int, control_seeds: int) -> list[tuple[str, int]]:
    """(kind, seed) of every run, seed by seed: `main` and the method's controls."""
    kinds = {"main": seeds, **dict.fromkeys(CONTROLS_OF[method], control_seeds)}
    return [(kind, seed) for seed in range(1, seeds + 1) for kind, count in kinds.items() if seed <= count]


def overrides_of(kind: str, seed: int) -> dict[str, str]:
    """What distinguishes a run from its recipe."""
    return {"seed": str(seed), **CONTROLS.get(kind, {})}


def read_pair(run: Path, method: str, backbone: str, kind: str, seed: int) -> tuple[dict, dict]:
    """Scores before and after one finished run.

    Raises:
        EvaluationError: the run is missing, unfinished, or not what its name says; the message names it.
    """
    if not (run / "config.yaml").is_file():
        raise EvaluationError(f"run {run} is missing: make it with `make evidence METHOD={method} BACKBONE={backbone}`")
    config = load_run_config(run)
    plain = OmegaConf.structured(config)
    identity = {"reward.method": method, "backbone.family": backbone, "policy.control": "none"}
    wanted = identity | overrides_of(kind, seed)
    found = {key: str(OmegaConf.select(plain, key)).lower() for key in wanted}
    wrong = [f"{key}={found[key]}, expected {value}" for key, value in wanted.items() if found[key] != value]
    if wrong:
        raise EvaluationError(f"run {run} has {'; '.join(wrong)}")
    base, tuned = require_scores(run, 0), require_scores(run, config.iterations)
    check_comparable(base, tuned)
    return base, tuned


def changes(pairs: list[tuple[dict, dict]], name: str) -> dict:
    """Mean change of a score over the runs, with its interval."""
    missing = [scores["policy_version"] for pair in pairs for scores in pair if name not in scores]
    if missing:
        raise EvaluationError(f"the evaluation of weights {missing[0]} has no score {name}")
    return mean_interval([tuned[name] - base[name] for base, tuned in pairs])


def evidence(out: Path, method: str, backbone: str, seeds: int, control_seeds: int) -> dict:
    """Content of the evidence summary.

    `gain` and `controls` are changes of `overall`. `best_of_g` is what choosing among the base model's G images with
    the same judge gains without any training. With a Solver, `understanding_gain` and `understanding_controls` are
    changes of `framed_answering`.
    """
    runs: dict[str, list[tuple[dict, dict]]] = {}
    for kind, seed in runs_of(method, seeds, control_seeds):
        pair = read_pair(out / f"{kind}-{seed}", method, backbone, kind, seed)
        runs.setdefault(kind, []).append(pair)
    main_runs = runs["main"]
    understood = [name for name in UNDERSTANDING if name in main_runs[0][0]]
    controls = {kind: pairs for kind, pairs in runs.items() if kind != "main"}
    solved = {
        "understanding_gain": changes(main_runs, FRAMED),
        "understanding_controls": {kind: changes(pairs, FRAMED) for kind, pairs in controls.items()},
    } if FRAMED in understood else {}  # fmt: skip
    return {
        "gain": changes(main_runs, "overall"),
        "controls": {kind: changes(pairs, "overall") for kind, pairs in controls.items()},
        **solved,
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
    if "understanding_gain" in result:
        rows.append(("understanding gain", result["understanding_gain"]))
        rows += [(f"its control: {name}", value) for name, value in result["understanding_controls"].items()]
    rows += [(f"change of {name.replace('_', ' ')}", value) for name, value in result["understanding_change"].items()]
    rows += [
        ("best of G, untrained", result["best_of_g"]),
        ("change of the frozen judge's reward", result["reward_change"]),
    ]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:{width}}  {interval(value)}" for label, value in rows)


def main(argv: list[str] | None = None) -> int:
    """Write OUT/summary.json and print it as text."""
    module = "unified_rl.evaluation.evidence"
    example = f"python -m {module} --method gvu --backbone janus --seeds 3 --out runs/evidence/gvu-janus"
    parser = command_parser(module, __doc__, example)
    parser.add_argument("--method", required=True, choices=sorted(CONTROLS_OF))
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--seeds", type=int, required=True, metavar="N")
    parser.add_argument("--control-seeds", type=int, metavar="N", help="seeds of each control; default: all")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the runs")
    parser.add_argument("--list", action="store_true", help="print each run's name and overrides instead")
    arguments = parser.parse_args(argv)
    controls = arguments.seeds if arguments.control_seeds is None else arguments.control_seeds
    if not 1 <= controls <= arguments.seeds:
        parser.error("--seeds must be at least 1, --control-seeds from 1 to --seeds")
    if arguments.list:
        for kind, seed in runs_of(arguments.method, arguments.seeds, controls):
            print(f"{kind}-{seed}", *(f"{key}={value}" for key, value in overrides_of(kind, seed).items()))
        return EXIT_OK
    if arguments.out is None:
        parser.error("--out is required")
    result = evidence(arguments.out, arguments.method, arguments.backbone, arguments.seeds, controls)
    store(arguments.out / "summary.json", (json.dumps(result, indent=1) + "\n").encode())
    print(text(result))
    return EXIT_OK


if __name__ == "__main__":
    run_stage(main)
