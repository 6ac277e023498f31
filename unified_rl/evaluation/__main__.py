"""`python -m unified_rl.evaluation --run RUN --iteration K`."""

from unified_rl.evaluation.stage import main
from unified_rl.runtime import run_stage

run_stage(main)
