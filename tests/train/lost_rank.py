"""`lost_rank.py OUT`: rank 1 of two falls silent in an operation of a group like DeepSpeed's; what rank 0 says."""

import json
import os
import signal
import sys
import time

import deepspeed  # noqa: F401 - before the fork: on a busy machine two processes import it minutes apart
import torch.distributed as dist

from unified_rl.runtime import current_ranks
from unified_rl.train import zero3

TIMEOUT = 15.0

if __name__ == "__main__":
    child = os.fork()
    os.environ.update(WORLD_SIZE="2", RANK="0" if child else "1", LOCAL_RANK="0" if child else "1")
    zero3.init_process_group(current_ranks(), "cpu", TIMEOUT)
    group = dist.new_group(range(2))
    dist.barrier(group)
    time.sleep(4)  # a few signs of life
    if not child:
        os.kill(os.getpid(), signal.SIGSTOP)
    start = time.monotonic()
    try:
        with zero3.lost_ranks_named():
            dist.barrier(group)
    except zero3.TrainError as error:
        with open(sys.argv[1], "w") as file:
            json.dump([str(error), time.monotonic() - start], file)
    finally:
        os.kill(child, signal.SIGKILL)
    os._exit(0)  # the other rank is not there to part from
