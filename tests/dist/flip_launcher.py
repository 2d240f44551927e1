"""launch/pretrain.py on a rank whose memory flips a bit of a shared parameter after a step: `FLIP=step:rank`."""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

import torch

from mmtrain.parallel.replicas import copies
from mmtrain.train import trainer
from tests.dist.kill_launcher import PRETRAIN

if __name__ == "__main__":
    step, rank = map(int, os.environ.pop("FLIP").split(":"))
    train_step, done = trainer.train_step, []

    def flipping(model: Any, *given: Any, **more: Any) -> Any:
        result = train_step(model, *given, **more)
        done.append(result)
        if len(done) == step and int(os.environ["RANK"]) == rank:
            next(copies(model.module))[2][0][1].view(-1).view(torch.int32)[0] ^= 1
        return result

    trainer.train_step = flipping
    sys.argv[0] = PRETRAIN
    runpy.run_path(PRETRAIN, run_name="__main__")
