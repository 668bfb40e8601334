"""`mtcl` whose ranks are killed at random points of training: torchrun runs this file in test_faults.py.

MORTAL_KILLS says how often; MORTAL_SEED seeds when, who, and whether in the middle of writing a checkpoint.
"""

import os
import random
import signal
import sys

from torch.distributed.checkpoint import FileSystemWriter

from mtcl_torchrec.cli import main
from mtcl_torchrec.training import loop

life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
rank = int(os.environ["RANK"])
fate = random.Random(f"{os.environ['MORTAL_SEED']}/{life}")
victim = fate.randrange(int(os.environ["WORLD_SIZE"]))
steps_to_live = fate.randrange(2, 12)
dies_writing = fate.random() < 0.4
doomed = rank == victim and life < int(os.environ["MORTAL_KILLS"])
steps = 0


def die() -> None:
    with open(os.environ["MORTAL_LOG"], "a") as log:
        log.write(f"life {life}: rank {rank} {'writing' if dies_writing else 'training'} at step {steps}\n")
    os.kill(os.getpid(), signal.SIGKILL)


build_pipeline, write_data = loop.build_pipeline, FileSystemWriter.write_data


def mortal_pipeline(*args, **options):
    pipeline = build_pipeline(*args, **options)
    progress = pipeline.progress

    def step(batches):
        global steps
        if doomed and not dies_writing and steps == steps_to_live:
            die()
        steps += 1
        return progress(batches)

    pipeline.progress = step
    return pipeline


def mortal_write(self, *args, **options):
    future = write_data(self, *args, **options)
    if doomed and dies_writing:
        die()  # this rank's part is on disk, the description of the whole is not
    return future


loop.build_pipeline = mortal_pipeline
FileSystemWriter.write_data = mortal_write

if __name__ == "__main__":
    sys.exit(main())
