"""Options of the launchers that serve a model, checked before anything is read. Needs no torch."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from mmtrain.errors import ConfigError
from mmtrain.infer.device import check_device_name
from mmtrain.infer.layout import RankLayout
from mmtrain.infer.request import Request, check_rope_base, checked_text
from mmtrain.infer.sampling import Sampling
from mmtrain.infer.serving.options import EngineOptions

if TYPE_CHECKING:
    from mmdata.prepare_images.template import Template
    from mmtrain.infer.load import OpenedCheckpoint
    from mmtrain.infer.open import OpenModel
    from mmtrain.vision.prompts import ImagePrompts

_GIB = 1 << 30
_AXES = {
    "tp": "heads, widths and vocabulary",
    "ep": "the experts of a layer",
    "etp": "the width of an expert",
    "cp": "keys, and the reading of long prompts",
}


def add_engine_options(parser: argparse.ArgumentParser, at_once: str, most: int | None = None) -> None:
    """Add the options of how a checkpoint is read, of its precision and layout, and of an engine's sizes.

    Args:
        parser: of a launcher.
        at_once: what is at work at once, for the help.
        most: default of their number; None: as :class:`~mmtrain.infer.serving.options.EngineOptions`.
    """
    parser.add_argument(
        "--no-verify", action="store_true", help="do not read the whole checkpoint against its checksums"
    )
    parser.add_argument("--tokenizer", help='the run\'s tokenizer.json, a folder with it, or "bytes" (default: found)')
    for axis, shared in _AXES.items():
        parser.add_argument(f"--{axis}", type=int, default=1, help=f"ranks of torchrun that share {shared} (default 1)")
    parser.add_argument("--rope-base", type=float, help="RoPE base (default: the one the checkpoint was saved with)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda when there is one)")
    parser.add_argument("--precision", choices=["fp32", "bf16", "int8", "int8-g128"], default="fp32",
                        help="of weights and products (default fp32)")  # fmt: skip
    parser.add_argument(
        "--max-running", type=int, default=most, help=f"{at_once} at work at once (default {most or 64})"
    )
    parser.add_argument("--prefill-tokens", type=int, help="tokens of prompts read in one step (default 4096)")
    parser.add_argument("--memory-gib", type=float, help="size of keys and states (default: 0.8 of what is free)")


def check_engine_options(options: argparse.Namespace) -> None:
    """Refuse a layout, a device, a RoPE base, sizes or texts that make no sense, and a checkpoint that is not there.

    Raises:
        ConfigError: the first that does not.
    """
    check_device_name(options.device)
    layout_of(options).check_processes()
    if options.rope_base is not None:
        check_rope_base(options.rope_base)
    engine_options(options, EngineOptions()).validate()
    for name in ("user", "assistant", "name"):  # of the launchers that have them
        if (text := getattr(options, name, None)) is not None:
            checked_text(text, f"--{name}")
    if not options.checkpoint.exists():
        raise ConfigError("checkpoint", options.checkpoint, "no such folder", "give a run folder or a checkpoint")


def check_options(options: argparse.Namespace) -> Request:
    """Refuse options that make no sense, and return what is wanted, without its prompt.

    Raises:
        ConfigError: the first that is wrong.
    """
    sampling = Sampling.from_options(
        options.greedy, options.temperature, options.top_k, options.top_p, options.repetition_penalty
    )
    request = Request("", options.tokens, sampling, options.samples, options.seed, options.ignore_eod,
                      not (options.no_echo or options.interactive), tuple(options.stop or ()))  # fmt: skip
    request.validate()
    for stop in request.stop:
        checked_text(stop, "--stop")
    check_engine_options(options)
    _check_images(options)
    if options.prompts is None:
        for name in ("out", "max_running"):
            if getattr(options, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(option, getattr(options, name), "has no effect without --prompts", "leave it out")
    elif options.samples > 1:
        raise ConfigError("--samples", options.samples, "has no effect with --prompts", "give lines of several seeds")
    if options.out is not None and Path(options.out).exists():
        raise ConfigError("--out", options.out, "is there already", "give a new file, or take it away")
    if options.out is not None and not Path(options.out).parent.is_dir():
        raise ConfigError("--out", options.out, "its folder does not exist", "make it, or give another file")
    return request


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of how turns are written, which prompts with images need."""
    parser.add_argument("--user", metavar="TEXT", help="a user's turn, \"{}\" for what is said (default: the run's)")
    parser.add_argument("--assistant", metavar="TEXT", help="an assistant's turn, likewise")


def _check_images(options: argparse.Namespace) -> None:
    for name in ("user", "assistant"):
        if getattr(options, name) is not None and not options.chat:
            raise ConfigError(f"--{name}", getattr(options, name), "has no effect without --chat", "leave it out")
    if options.image:
        for name in ("prompts", "interactive"):
            if getattr(options, name):
                raise ConfigError("--image", options.image[0], f"has no effect with --{name}",
                                  'lines of --prompts have "images"')  # fmt: skip
        for image in options.image:
            if not Path(image).is_file():
                raise ConfigError("--image", image, "no such file", "give an image that is there")
    if options.chat and options.interactive:
        raise ConfigError("--chat", "true", "has no effect with --interactive", "leave one of the two out")


def image_prompts(options: argparse.Namespace, checkpoint: OpenedCheckpoint) -> ImagePrompts:
    """Return what makes prompts with images, and turns as the run's corpora write them; with torch.

    Raises:
        ConfigError: a text of turns does not say where what is said goes.
    """
    from mmtrain.vision.prompts import ImagePrompts

    return ImagePrompts(checkpoint.tokenizer, checkpoint.model, turns_of(options, checkpoint.path))


def turns_of(options: argparse.Namespace, checkpoint: Path) -> Template:
    """Return how turns are written: as the options say, else as the run's corpora write them, else as usual.

    Raises:
        ConfigError: a text of turns does not say where what is said goes.
    """
    from mmtrain.checkpoint.progress import RECORD, read_meta
    from mmtrain.vision.prompts import template_of_run, with_turns

    meta = read_meta(checkpoint) if (checkpoint / RECORD).exists() else {}
    return with_turns(template_of_run(meta), options.user, options.assistant)


def open_asked(options: argparse.Namespace) -> AbstractContextManager[OpenModel]:
    """Open the checkpoint that the options name, as they say; with torch.

    Raises:
        ConfigError, DataError: as :func:`~mmtrain.infer.open.open_model` raises them.
    """
    from mmtrain.infer.open import open_model

    return open_model(
        options.checkpoint, layout_of(options), tokenizer=options.tokenizer, device=options.device,
        rope_base=options.rope_base, precision=options.precision, verify=not options.no_verify,
    )  # fmt: skip


def layout_of(options: argparse.Namespace) -> RankLayout:
    """Return the ranks that are asked for."""
    return RankLayout(options.tp, options.ep, options.etp, options.cp)


def engine_options(options: argparse.Namespace, planned: EngineOptions) -> EngineOptions:
    """Return the sizes of the engine: those that were given, and otherwise the planned ones.

    Raises:
        ConfigError: a size that makes no sense.
    """
    given = {"max_running": options.max_running, "prefill_tokens": options.prefill_tokens}
    for name, value in given.items():
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}", value, "must be at least 1", "leave it out")
    if options.memory_gib is not None:
        if not 0 < options.memory_gib < float("inf"):
            raise ConfigError("--memory-gib", options.memory_gib, "must be a number above 0", "leave it out")
        given["memory_bytes"] = int(options.memory_gib * _GIB)
    return replace(planned, **{name: value for name, value in given.items() if value is not None})


@contextlib.contextmanager
def output(file: str | None) -> Iterator[TextIO]:
    """Open a new file to write to; None is standard output.

    Raises:
        ConfigError: it cannot be made.
    """
    if file is None:
        yield sys.stdout
        return
    with contextlib.ExitStack() as stack:
        try:
            stream = stack.enter_context(Path(file).open("x", encoding="utf-8"))
        except OSError as error:
            raise ConfigError("--out", file, f"cannot be written ({error.strerror})", "give another file") from None
        yield stream
