"""What the shell launchers ask: configuration values, the stages that are left, a free port.

    python -m unified_rl.launching values --run RUN [--recipe NAME] [key=value ...] KEY ...   one value a line
    python -m unified_rl.launching plan --run RUN [--recipe NAME] [key=value ...]             `STAGE ITERATION` a line
    python -m unified_rl.launching port

Both questions about a run create `RUN/config.yaml` or compare the arguments with it; `--dry-run` writes nothing.
Starts without torch: the launchers call it before every stage.
"""

from __future__ import annotations

import argparse
import socket
from pathlib import Path

from omegaconf import OmegaConf

from unified_rl.config import ConfigError, RunConfig, keys_of, nearest_key, open_run, resolve
from unified_rl.ledger import Run, iteration_name
from unified_rl.manifests import MANIFEST_NAME
from unified_rl.runtime import EXIT_OK, command_parser, run_stage

TRAINING_STAGES = ("rollout", "reward", "train")


def config_value(config: RunConfig, key: str) -> str:
    """A leaf of the configuration as the shell sees it; booleans are true and false.

    Raises:
        ConfigError: no such key; the message names the nearest one.
    """
    if key not in keys_of(RunConfig):
        raise ConfigError(f"unknown key {key}; the nearest valid key is {nearest_key(key)}")
    value = OmegaConf.select(OmegaConf.structured(config), key)
    return str(value).lower() if isinstance(value, bool) else str(value)


def evaluation_due(config: RunConfig, trained: int) -> bool:
    """Whether the weights after `trained` iterations are evaluated: base, last, and every n-th between."""
    if not config.evaluate.prompts:
        return False
    every = config.evaluate.every
    return trained in (0, config.iterations) or (every > 0 and trained % every == 0)


def remaining_stages(run: Run) -> list[tuple[str, int]]:
    """(stage, iteration) of everything the loop still has to start, in order; committed stages are left out.

    The iteration of `evaluate` counts trained iterations, so 0 is the base; `report` comes last, always.
    """
    stages: list[tuple[str, int]] = []
    for trained in range(run.config.iterations + 1):
        folder = run.path / "evaluation" / iteration_name(trained)
        if evaluation_due(run.config, trained) and not (folder / MANIFEST_NAME).is_file():
            stages.append(("evaluate", trained))
        if trained < run.config.iterations:
            stages += [(stage, trained) for stage in TRAINING_STAGES if run.manifest(trained, stage) is None]
    return [*stages, ("report", run.config.iterations)]


def free_port() -> int:
    """A TCP port that nothing on this machine listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def open_config(arguments: argparse.Namespace, overrides: list[str]) -> RunConfig:
    """The run's configuration; with `--dry-run` a run that does not exist is resolved but not created."""
    exists = (Path(arguments.run) / "config.yaml").exists()
    if arguments.dry_run and not exists and arguments.recipe is not None:
        return resolve(arguments.recipe, overrides)
    return open_run(arguments.run, arguments.recipe, overrides)


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = command_parser("unified_rl.launching", __doc__)
    parser.add_argument("question", choices=("values", "plan", "port"))
    parser.add_argument("--run", metavar="RUN", help="run folder")
    parser.add_argument("--recipe", metavar="NAME", help="recipe name or YAML file; needed to create a run")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    parser.add_argument("words", nargs="*", metavar="key=value|KEY")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.question == "port":
        print(free_port())
        return EXIT_OK
    if arguments.run is None:
        parser.error("--run RUN is required")
    keys = [word for word in arguments.words if "=" not in word]
    if keys and arguments.question == "plan":
        raise ConfigError(f"override {keys[0]!r} is not of the form key=value")
    config = open_config(arguments, [word for word in arguments.words if "=" in word])
    if arguments.question == "values":
        lines = [config_value(config, key) for key in keys]
    else:
        lines = [f"{stage} {iteration}" for stage, iteration in remaining_stages(Run(arguments.run, config))]
    print("\n".join(lines))
    return EXIT_OK


if __name__ == "__main__":
    run_stage(main)
