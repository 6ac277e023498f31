"""`python -m unified_rl.rollout --run RUN --iteration K`."""

from unified_rl.rollout.stage import main
from unified_rl.runtime import run_stage

run_stage(main)
