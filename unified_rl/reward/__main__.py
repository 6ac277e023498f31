"""`python -m unified_rl.reward --run RUN --iteration K`."""

from unified_rl.reward.stage import main
from unified_rl.runtime import run_stage

run_stage(main)
