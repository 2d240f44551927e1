#!/usr/bin/env python
"""The inference engine on a GPU: decode steps beside the bytes that they must move, prefill beside the whole forward.

`python -m mmtrain.bench.infer_gpu --out DIR [--only NAME,...]`. Weights are random. Figures go to DIR/infer.json as
they come, then a picture to DIR/infer.png and a table to the terminal; cheap cases come first.

- *step_ms*: median of whole steps of the engine, with scheduling and the choice of tokens, as a run has them;
- *device_ms*: median of the passes through the model alone;
- *floor_ms*: bytes of the weights once, of states read and written, of keys read, over the measured rate of a copy;
- *weights_of_plan*: weights as the allocator counts them over what `mmtrain.infer.planning` reckons;
- *step_of_plan*: memory that a step of a prefill takes at most beside weights, keys and states, over what it reckons;
- *mfu*: useful operations of a prefill (the head for one token) over the dense bf16 peak.

`--draw` makes the picture and the table anew from DIR/infer.json, without a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmtrain.bench.infer.cases import CASES, Case, Decode, Mixed, Peer, Prefill, Shares
from mmtrain.bench.infer.decode import decode
from mmtrain.bench.infer.mixed import mixed
from mmtrain.bench.infer.models import ServedModel, copy_rate, model_config, served
from mmtrain.bench.infer.peer import peer
from mmtrain.bench.infer.prefill import prefill
from mmtrain.bench.infer.report import draw, table, with_predictions
from mmtrain.bench.infer.shares import cut_down, shares
from mmtrain.errors import ConfigError


class Bench:
    """A device, its model of the moment, and the figures so far."""

    def __init__(self, out: Path, steps: int) -> None:
        self._out, self._steps, self._device = out, steps, torch.device("cuda", 0)
        self._rate = copy_rate(self._device)
        self._key: tuple[str, str, bool] | None = None
        self._served: ServedModel | None = None
        self._machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
                         "copy_gb_s": self._rate / 1e9}  # fmt: skip
        self.rows: list[dict[str, Any]] = []

    def measure(self, name: str) -> None:
        """Add a case's row, or its error, and write all."""
        case = CASES[name]
        try:
            figures = self._figures(case)
        except Exception as error:
            traceback.print_exc()
            figures = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        self._clear()
        label = {"case": name, "model": case.model, "precision": case.precision}
        self.rows.append(label | ({"graphs": case.graphs} if isinstance(case, Decode) else {}) | figures)
        print(json.dumps(self.rows[-1]), flush=True)
        (self._out / "infer.json").write_text(json.dumps({**self._machine, "rows": self.rows}, indent=1))

    def _figures(self, case: Case) -> dict[str, Any]:
        wait = torch.cuda.synchronize
        if isinstance(case, Peer):
            self._served = self._key = None
            self._clear()
            return peer(case, model_config(case.model), self._device, self._steps, wait)
        found = self._model(case)
        if isinstance(case, Decode):
            return decode(case, found, self._rate, self._steps, wait)
        if isinstance(case, Shares):
            return shares(case, found, wait)
        if isinstance(case, Mixed):
            return mixed(case, found, self._steps, wait)
        assert isinstance(case, Prefill)
        return prefill(case, found, wait, lambda line: print(line, flush=True))

    def _model(self, case: Case) -> ServedModel:
        """The case's model, which takes the place of the one before."""
        key = (case.model, case.precision, isinstance(case, Shares))
        if self._served is None or key != self._key:
            self._served = None
            self._clear()
            config = model_config(case.model)
            config = cut_down(config) if isinstance(case, Shares) else config
            self._key, self._served = key, served(config, case.precision, self._device)
        return self._served

    def _clear(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the cases asked for.

    Raises:
        ConfigError: there is no such case, or no figures to draw.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the figures")
    parser.add_argument("--only", default=",".join(CASES), help="cases with commas between them")
    parser.add_argument("--steps", type=int, default=20, help="timed ones of a decode case, at most 60")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    names = [name for name in options.only.split(",") if name]
    for name in names:
        if name not in CASES:
            raise ConfigError("--only", name, "is no case", f"give some of {', '.join(CASES)}")
    if not 1 <= options.steps <= 60:
        raise ConfigError("--steps", options.steps, "must be from 1 to 60", "leave it out")
    if options.draw:
        report(options.out)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.out, options.steps)
    for name in CASES:
        if name in names:
            bench.measure(name)
    report(options.out)


def report(out: Path) -> None:
    """Draw and print the figures of a folder.

    Raises:
        ConfigError: it has none.
    """
    path = out / "infer.json"
    if not path.exists():
        raise ConfigError("--out", out, "has no infer.json", "measure first, or give another folder")
    rows = with_predictions(json.loads(path.read_text())["rows"])
    draw(rows, out / "infer.png")
    print(table(rows))


if __name__ == "__main__":
    main()
