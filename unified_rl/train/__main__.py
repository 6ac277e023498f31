"""`deepspeed --num_gpus R --no_local_rank --module unified_rl.train --run RUN --iteration K`; one process per rank."""

from __future__ import annotations

from unified_rl.config import open_run
from unified_rl.ledger import Run
from unified_rl.runtime import current_ranks, run_stage, stage_arguments
from unified_rl.standby import stand_by


def main(argv: list[str] | None = None) -> int:
    """Command line of the stage."""
    example = "deepspeed --num_gpus 2 --no_local_rank --module unified_rl.train --run runs/demo --iteration 0"
    arguments = stage_arguments("train", example, argv)
    config = open_run(arguments.run, arguments.recipe, arguments.overrides)
    from unified_rl.train.stage import train  # seconds of imports, that `--help` and wrong arguments need not wait for

    run = Run(arguments.run, config)
    stand_by(run, "deepspeed", "torch._dynamo")
    return train(run, arguments.iteration, current_ranks())


if __name__ == "__main__":
    run_stage(main)
