"""`python -m unified_rl.report --run RUN`: TensorBoard logs, before_after.png and report.html."""

from __future__ import annotations

from pathlib import Path

from unified_rl.report.figures import write_before_after
from unified_rl.report.html import write_report
from unified_rl.report.tensorboard import write_tensorboard
from unified_rl.report.truth import read_truth
from unified_rl.runtime import EXIT_OK, command_parser, run_stage


def main(argv: list[str] | None = None) -> int:
    """Write everything that shows a run."""
    parser = command_parser("unified_rl.report", __doc__, "python -m unified_rl.report --run runs/demo")
    parser.add_argument("--run", type=Path, required=True, metavar="RUN")
    truth = read_truth(parser.parse_args(argv).run)
    for path in (write_before_after(truth), write_report(truth), write_tensorboard(truth)):
        if path is not None:
            print(path)
    if truth.run.manifest(truth.config.iterations - 1, "train") is not None:
        truth.run.write_status(state="finished", iteration=truth.config.iterations)
    return EXIT_OK


if __name__ == "__main__":
    run_stage(main)
