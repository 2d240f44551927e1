"""A rank of the pre-flight with a fault: ``faulty_worker.py FAULT WORKER-OPTIONS...``."""

from __future__ import annotations

import os
import sys
import time

import torch

from mmtrain.health.preflight import measures, worker


def no_device(options: object) -> torch.device:
    raise RuntimeError("GPU 0 is not visible: torch sees 0")


def main() -> int:
    fault, arguments = sys.argv[1], sys.argv[2:]
    own, between = measures.device_rates, measures.group_rates
    if fault in ("matrix", "copy"):
        measures.device_rates = lambda device: {**own(device), fault: 1e-12}
    elif fault in ("all_reduce", "all_to_all"):
        measures.group_rates = lambda device: {**between(device), fault: 1e-12}
    elif fault == "invisible":
        worker._device = no_device
    elif fault == "dies":
        os._exit(9)
    elif fault == "hangs":
        time.sleep(1000)
    return worker.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
