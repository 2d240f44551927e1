"""Plan the serving of a model: ``python -m mmtrain.infer.plan minimax_text_01 --tp 8 --precision int8``.

MODEL is a name of configs/model, with options after it (model.num_layers=40), or a run folder, a checkpoint or a
Hugging Face folder. Nothing is read but shapes, and no GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmtrain.command_line import Parser, exit_code
from mmtrain.config import ModelConfig
from mmtrain.errors import ConfigError
from mmtrain.output import say

if TYPE_CHECKING:
    from mmtrain.infer.planning.plan import ServingPlan

_GB = 10**9


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan, and return the exit code: 0, 1 where the requests do not fit, 2 for bad input."""
    parser = Parser(prog="python -m mmtrain.infer.plan", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("model", nargs="+", metavar="MODEL", help="a name, then options; or a folder")
    parser.add_argument("--configs", type=Path, default=Path("configs"), help="of the names (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of each request (default %(default)s)")
    parser.add_argument("--requests", type=int, default=1, help="at once (default %(default)s)")
    parser.add_argument("--tp", type=int, default=1, help="GPUs that share the model (default %(default)s)")
    parser.add_argument("--ep", type=int, help="groups of these that share the experts out (default: as many as can)")
    parser.add_argument("--precision", choices=["fp32", "bf16", "int8", "int8-g128"], default="int8",
                        help="of weights (default %(default)s)")  # fmt: skip
    parser.add_argument("--memory-gb", type=float, default=80, help="of a GPU, 10^9 bytes (default %(default)s)")
    parser.add_argument("--prefill-tokens", type=int, default=4096, help="of prompts in a step (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="all figures in bytes, as JSON")
    given = parser.parse_args(arguments)
    return exit_code(lambda: _print_plan(given))


def _print_plan(given: argparse.Namespace) -> int:
    from mmtrain.infer.planning.plan import plan_serving
    from mmtrain.infer.planning.weights import ServingLayout
    from mmtrain.infer.serving.options import EngineOptions

    if not 0 < given.memory_gb < float("inf"):
        raise ConfigError("--memory-gb", given.memory_gb, "must be a number above 0", "for example 80")
    for name in ("requests", "prefill_tokens"):
        if getattr(given, name) < 1:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(option, getattr(given, name), "must be at least 1", "leave it out")
    config = _model_of(given.model, given.configs)
    ep = _most_ep(config, given.tp) if given.ep is None else given.ep
    options = EngineOptions(max_running=given.requests, prefix_slots=0, prefill_tokens=given.prefill_tokens)
    plan = plan_serving(config, ServingLayout(given.tp, ep), given.precision, given.tokens,
                        int(given.memory_gb * _GB), options)  # fmt: skip
    say(json.dumps(plan.as_dict(), indent=1) if given.json else _table(plan, options.memory_share))
    return 0 if plan.fits else 1


def _table(plan: ServingPlan, share: float) -> str:
    devices = f"{plan.tp} GPUs of {plan.device_bytes / _GB:g} GB (experts over {plan.ep})"
    lines = [f"{plan.model}, {plan.precision} weights, {plan.requests:,} x {plan.tokens:,} tokens, on {devices}"]
    rows = [(f"weights: {name}", size) for name, size in plan.weights.items()]
    rows += [("weights", plan.weights_bytes), ("keys and values", plan.keys_bytes), ("states", plan.states_bytes),
             ("copies of a layer's keys", plan.copies_bytes), ("a step, at most", plan.step_bytes),
             ("together", plan.used_bytes)]  # fmt: skip
    lines.append(f"{'GB of 10^9 bytes':28}{'a GPU':>12}{f'all {plan.tp}':>12}")
    lines += [f"{name:28}{size / _GB:12.3f}{size * plan.tp / _GB:12.3f}" for name, size in rows]
    longest = "any length" if plan.longest is None else f"{plan.longest:,} tokens"
    lines.append(f"longest context of each request: {longest} (of free memory the engine takes {share:g})")
    return "\n".join(lines if plan.fits else [*lines, "the requests do not fit"])


def _most_ep(config: ModelConfig, tp: int) -> int:
    """The most of tp devices over which whole experts can be shared out."""
    ways = (n for n in range(1, tp + 1) if config.num_experts and tp % n == 0 and config.num_experts % n == 0)
    return max(ways, default=1)


def _model_of(words: list[str], configs: Path) -> ModelConfig:
    """Return the architecture that the command names.

    Raises:
        ConfigError: there is none.
    """
    first, *options = words
    if Path(first).is_dir():
        if options:
            raise ConfigError("MODEL", options[0], "a folder has its own options", "leave it out")
        return _model_in(Path(first))
    from mmtrain.config.cli import compose

    if not configs.is_dir():
        raise ConfigError("--configs", configs, "no such folder", "give that of the YAML groups")
    first = first.removeprefix("model=")
    return compose([f"model={first}", *options, "run.name=plan", "run.plan=true", "data.path=unknown"], configs).model


def _model_in(folder: Path) -> ModelConfig:
    from mmtrain.checkpoint.listing import find_checkpoint
    from mmtrain.checkpoint.progress import read_meta
    from mmtrain.config.schema import build
    from mmtrain.hf.folder import is_hf_folder, open_folder

    if is_hf_folder(folder):
        return open_folder("MODEL", folder).model
    checkpoint = find_checkpoint("MODEL", folder, lambda line: None)
    return build(ModelConfig, read_meta(checkpoint)["config"]["model"], "model")


if __name__ == "__main__":
    sys.exit(main())
