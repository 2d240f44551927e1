"""A trial of what the installed transformers makes of an export: by its logits, not by its version.

A narrow model with the heads, RoPE, depth of decay and residuals of the one that is exported goes through the same
export, and another process loads it with transformers and computes logits. transformers is no dependency of this
package: it is imported in that process alone, and where it is missing there is nothing to tell.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mmtrain.build import build_model
from mmtrain.checkpoint.safetensors_file import TensorFile, read_header
from mmtrain.config import ModelConfig
from mmtrain.hf.export import export
from mmtrain.hf.sources import ModuleWeights
from mmtrain.hf.target import Target
from mmtrain.model.packed_seq import Packing

TOLERANCE = 1e-3  # of the norm of the logits: float32 rounding is below 1e-5, another rotation above 1e-2
_TOKENS, _VOCAB, _WIDTH = 300, 64, 64  # more tokens than a block of the port's lightning attention has
_SECONDS = 600
_CHILD = "mmtrain.hf.transformers_logits"


@dataclass(frozen=True)
class Trial:
    """What came of a trial.

    Attributes:
        error: norm of the difference of logits over their norm; None where there are none.
        problem: why there are none.
    """

    error: float | None = None
    problem: str = ""

    @property
    def agrees(self) -> bool:
        """Whether transformers computes what we do."""
        return self.error is not None and self.error < TOLERANCE


def try_transformers(model: ModelConfig, target: Target) -> Trial | None:
    """Compare logits of a narrow model with transformers'; None where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    narrow = _narrow(model)
    made = build_model(narrow, seed=1).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
            elif name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(2.0)  # attention that hangs on positions
        tokens_T = torch.randint(0, _VOCAB, (_TOKENS,), generator=generator)
        ours_TV = made(tokens_T, Packing.from_lengths([_TOKENS]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        export(narrow, ModuleWeights(made), target, path / "model", torch.float32)
        command = [
            sys.executable,
            "-m",
            _CHILD,
            str(path / "model"),
            str(path / "logits"),
            *map(str, tokens_T.tolist()),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False, env=_alone())
        except subprocess.TimeoutExpired:
            return Trial(problem=f"no answer within {_SECONDS} s")
        if done.returncode != 0 or not (path / "logits").exists():
            return Trial(problem=(done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200])
        theirs_TV = TensorFile(path / "logits").tensor(read_header(path / "logits")["logits"]).clone()
    return Trial(error=((ours_TV - theirs_TV).norm() / ours_TV.norm()).item())


def _narrow(model: ModelConfig) -> ModelConfig:
    """Return a model of one or two layers of each kind in turn, ending with the kind that the last layer has."""
    letters = "".join(sorted(set(model.layer_types))) + model.layer_types[-1]
    experts = min(model.num_experts, 4)
    return replace(
        model, name="narrow", vocab_size=_VOCAB, hidden_size=_WIDTH, num_layers=len(letters), layer_pattern=letters,
        ffn_hidden_size=16, num_experts=experts, top_k=min(model.top_k, max(1, experts)),
        deepnorm_alpha=model.alpha, deepnorm_beta=1.0, capacity_factor=None,
    )  # fmt: skip


def _alone() -> dict[str, str]:
    """Return the environment of a process that finds this package, and asks no network for anything."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
            "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
