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
    if os.environ["RANK"] == rank:
        measure, read = stragglers.product_seconds, BatchReader.read

        def slower(*given: Any) -> float:
            return 5 * measure(*given)

        def later(*given: Any) -> Any:
            time.sleep(0.5)
            return read(*given)

        if what == "device":
            stragglers.product_seconds = slower
        else:
            BatchReader.read = later
    sys.argv[0] = PRETRAIN
    runpy.run_path(PRETRAIN, run_name="__main__")
