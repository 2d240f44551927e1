"""launch/pretrain.py on a rank whose device, or whose storage, is slow: `SLOW=rank:device` or `SLOW=rank:rows`."""

from __future__ import annotations

import os
import runpy
import sys
import time
from typing import Any

from mmtrain.health import stragglers
from mmtrain.train.batches import BatchReader
from tests.dist.kill_launcher import PRETRAIN

if __name__ == "__main__":
    rank, what = os.environ.pop("SLOW").split(":")
    slow, read = os.environ["RANK"] == rank, BatchReader.read
    pace = 0.05 if slow and what == "device" else 0.01  # not measured: what else this machine does is not the test's
    stragglers.product_seconds = lambda *given: pace

    def later(*given: Any) -> Any:
        time.sleep(0.5)
        return read(*given)

    if slow and what == "rows":
        BatchReader.read = later
    sys.argv[0] = PRETRAIN
    runpy.run_path(PRETRAIN, run_name="__main__")
