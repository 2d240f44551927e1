#!/usr/bin/env python
"""NVIDIA apex's FusedAdam beside torch's fused AdamW and ours: the same steps, and their times, on one GPU.

    python -m mmtrain.bench.apex_adam --source FOLDER --out DIR [--model hybrid_410m]

FOLDER holds apex's source (https://github.com/NVIDIA/apex), or of it `csrc/multi_tensor_adam.cu`,
`csrc/multi_tensor_apply.cuh`, `csrc/type_shim.h`, `apex/multi_tensor_apply` and `apex/optimizers/fused_adam.py`. The
kernels of Adam alone are built, with apex's own flags, by nvcc and ninja. Figures go to DIR/apex_adam.json; exit code 1
says that weights differ by more than rounding.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.bench.step_cases import CONFIGS
from mmtrain.build import meta_model
from mmtrain.config import OptimConfig
from mmtrain.config.cli import compose
from mmtrain.errors import ConfigError
from mmtrain.optim.optimizer import build_optimizer, update

NEEDED = ("csrc/multi_tensor_adam.cu", "csrc/multi_tensor_apply.cuh", "csrc/type_shim.h",
          "apex/multi_tensor_apply/__init__.py", "apex/multi_tensor_apply/multi_tensor_apply.py",
          "apex/optimizers/fused_adam.py")  # fmt: skip
FLAGS = ["-O3", "--use_fast_math", "-lineinfo"]  # those of apex's setup.py
LR, STEPS = 1e-3, 20
BYTES = 28  # of an fp32 parameter and step: weight and both moments read and written, the gradient read

# apex's own frontend wants the kernels of all its optimizers.
FRONTEND = """
#include <torch/extension.h>
using Lists = std::vector<std::vector<at::Tensor>>;
void multi_tensor_adam_cuda(int chunk, at::Tensor noop, Lists lists, const float lr, const float beta1,
                            const float beta2, const float epsilon, const int step, const int mode,
                            const int bias_correction, const float weight_decay);
void multi_tensor_adam_capturable_cuda(int chunk, at::Tensor noop, Lists lists, at::Tensor lr, const float beta1,
                                       const float beta2, const float epsilon, at::Tensor step, const int mode,
                                       const int bias_correction, const float weight_decay, at::Tensor inv_scale);
void multi_tensor_adam_capturable_master_cuda(int chunk, at::Tensor noop, Lists lists, at::Tensor lr,
                                              const float beta1, const float beta2, const float epsilon,
                                              at::Tensor step, const int mode, const int bias_correction,
                                              const float weight_decay, at::Tensor inv_scale);
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("multi_tensor_adam", &multi_tensor_adam_cuda, py::call_guard<py::gil_scoped_release>());
  m.def("multi_tensor_adam_capturable", &multi_tensor_adam_capturable_cuda, py::call_guard<py::gil_scoped_release>());
  m.def("multi_tensor_adam_capturable_master", &multi_tensor_adam_capturable_master_cuda,
        py::call_guard<py::gil_scoped_release>());
}
"""


def check_source(folder: Path) -> None:
    """Refuse a folder without what is built.

    Raises:
        ConfigError: the first file that is missing.
    """
    for name in NEEDED:
        if not (folder / name).is_file():
            raise ConfigError(
                "--source", folder, f"it has no {name}", "give a checkout of https://github.com/NVIDIA/apex"
            )


def build_kernels(folder: Path) -> ModuleType:
    """The extension `amp_C` with the kernels of Adam, built for this machine's GPU.

    Raises:
        ConfigError: there is no nvcc.
    """
    from torch.utils.cpp_extension import CUDA_HOME, load

    if CUDA_HOME is None:
        raise ConfigError(
            "CUDA_HOME", "(missing)", "there is no nvcc here", "install CUDA's compiler, or set CUDA_HOME"
        )
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability()))
    headers: list[str] = []
    if not (Path(CUDA_HOME) / "include/cusparse.h").exists():  # which torch's headers include, and its packages have
        headers = [str(path) for path in Path(torch.__file__).parents[1].glob("nvidia/*/include")]
    with tempfile.TemporaryDirectory() as scratch:  # what is loaded stays loaded
        frontend = Path(scratch) / "frontend.cpp"
        frontend.write_text(FRONTEND)
        sources = [str(frontend), str((folder / "csrc/multi_tensor_adam.cu").resolve())]
        return load(
            "amp_C", sources, extra_cuda_cflags=FLAGS, extra_include_paths=headers, build_directory=scratch,
            with_cuda=True,
        )  # fmt: skip


def load_fused_adam(folder: Path, kernels: ModuleType) -> type[torch.optim.Optimizer]:
    """FusedAdam of the folder, under the names that `optim=apex` imports; nothing else of apex is."""
    sys.modules["amp_C"] = kernels
    for name in ("apex", "apex.optimizers"):
        module = ModuleType(name)
        module.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = module
    adam = importlib.import_module("apex.optimizers.fused_adam").FusedAdam
    sys.modules["apex.optimizers"].FusedAdam = adam  # type: ignore[attr-defined]
    return adam


class Weights(nn.Module):
    """Weights of given shapes, the same in every object of one seed."""

    def __init__(self, shapes: Sequence[torch.Size], device: torch.device) -> None:
        super().__init__()
        random = torch.Generator(device).manual_seed(0)
        make = [torch.randn(shape, generator=random, device=device) * 0.02 for shape in shapes]
        self.all = nn.ParameterList(make)


Step = Callable[[list[Tensor]], None]


def optimizers(fused: type[torch.optim.Optimizer], make: Callable[[], Weights]) -> Iterator[tuple[str, Weights, Step]]:
    """Ways to update, each with weights of its own: torch's, ours, apex's as it is, and `optim=apex`."""
    config = OptimConfig()
    common: dict[str, Any] = {"lr": LR, "betas": (config.beta1, config.beta2), "eps": config.eps}

    def groups(weights: Weights) -> list[dict[str, Any]]:
        decayed = [p for p in weights.parameters() if p.ndim > 1]
        plain = [p for p in weights.parameters() if p.ndim <= 1]
        return [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]

    for name, build in (
        ("torch", lambda w: torch.optim.AdamW(groups(w), **common, fused=True)),
        ("apex", lambda w: fused(groups(w), **common, adam_w_mode=True)),
        ("optim=adamw", lambda w: build_optimizer(w, OptimConfig(name="adamw"))),
        ("optim=apex", lambda w: build_optimizer(w, OptimConfig(name="apex"))),
    ):
        weights = make()
        yield name, weights, _step(weights, build(weights), ours=name.startswith("optim"))


def _step(weights: Weights, optimizer: torch.optim.Optimizer, ours: bool) -> Step:
    parameters = list(weights.parameters())
    kept = torch.zeros((), dtype=torch.bool, device=parameters[0].device)

    def run(gradients: list[Tensor]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if ours:
            update(optimizer, LR, kept)
        else:
            optimizer.step()

    return run


def beyond_rounding(weights: Weights, right: Weights, steps: int) -> float:
    """Largest difference over what rounding allows; above 1 it is more.

    A step rounds a weight once, by half of its last bit, on either side; fast division and root, and moments rounded in
    another order, change an update, which is about the learning rate, by a few parts in a million: 10 are allowed.
    """
    found = 0.0
    for mine, theirs in zip(weights.parameters(), right.parameters(), strict=True):
        allowed = steps * (theirs.detach().abs() * 2**-23 + 1e-5 * LR)
        found = max(found, float(((mine.detach() - theirs.detach()).abs() / allowed).max()))
    return found


def measure(fused: type[torch.optim.Optimizer], shapes: Sequence[torch.Size], device: torch.device) -> dict[str, Any]:
    """Differences after `STEPS` steps on the same gradients, and the median milliseconds of a step."""
    ways = list(optimizers(fused, lambda: Weights(shapes, device)))
    gradients = [torch.empty(shape, device=device) for shape in shapes]
    random = torch.Generator(device).manual_seed(1)
    times: dict[str, list[float]] = {name: [] for name, _, _ in ways}
    for _ in range(STEPS):
        for gradient in gradients:
            gradient.normal_(generator=random).mul_(1e-3)
        for name, _, run in ways:
            times[name].append(_milliseconds(lambda run=run: run(gradients), device))
    right, count = ways[0][1], sum(shape.numel() for shape in shapes)
    rows = {}
    for name, weights, _ in ways:
        ms = statistics.median(times[name][3:])
        rows[name] = {"ms": round(ms, 3), "gb_s": round(BYTES * count / ms / 1e6),
                      "beyond_rounding": round(beyond_rounding(weights, right, STEPS), 4)}  # fmt: skip
    return {"parameters": count, "tensors": len(shapes), "steps": STEPS, "optimizers": rows}


def _milliseconds(run: Callable[[], None], device: torch.device) -> float:
    """Of a call, from an idle device until it is idle again: launches are part of it, as in a step that waits."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) * 1e3


def main(arguments: Sequence[str] | None = None) -> None:
    """Build, compare and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with apex's source")
    parser.add_argument("--out", type=Path, required=True, help="folder of the figures")
    parser.add_argument("--model", default="hybrid_410m", help="a preset, whose shapes are updated")
    given = parser.parse_args(arguments)
    check_source(given.source)
    if not torch.cuda.is_available():
        raise ConfigError("--source", given.source, "FusedAdam needs a GPU", "run this on one")
    config = compose(["stage=quickstart", f"model={given.model}", "data.path=none", "run.name=bench"], CONFIGS).model
    shapes = [parameter.shape for parameter in meta_model(config).parameters()]
    given.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    kernels = build_kernels(given.source)
    built = time.perf_counter() - began
    found = measure(load_fused_adam(given.source, kernels), shapes, torch.device("cuda"))
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    found = {**machine, "model": given.model, "build_s": round(built, 1), **found}
    print(json.dumps(found, indent=1), flush=True)
    (given.out / "apex_adam.json").write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(int(any(row["beyond_rounding"] > 1 for row in found["optimizers"].values())))


if __name__ == "__main__":
    main()
