"""`deepspeed --num_gpus R --no_local_rank --module unified_rl.train --run RUN --iteration K`."""

from unified_rl.runtime import run_stage
from unified_rl.train.stage import main

run_stage(main)
