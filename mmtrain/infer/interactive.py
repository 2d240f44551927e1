"""A conversation of lines: each is a prompt of its own, continued as soon as it is entered."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, TextIO

from mmdata.tokenizer import Tokenizer
from mmtrain.errors import OutOfDeviceMemory, is_user_error
from mmtrain.infer.engine import Engine
from mmtrain.infer.request import Request
from mmtrain.infer.write import write_request

if TYPE_CHECKING:
    from mmtrain.vision.prompts import ImagePrompts


def converse(
    engine: Engine, tokenizer: Tokenizer, request: Request, lines: Iterable[str], out: TextIO, prompts: ImagePrompts
) -> str:
    """Continue every line that comes, until there are no more; returns a line that sums them up.

    An empty line is passed over. One that cannot be continued is told on standard error, and the next one waited for.

    Args:
        engine: serves all of them, and knows the beginnings of earlier ones.
        tokenizer: of the model.
        request: what is wanted of each.
        lines: with or without their newline.
        out: where the text goes.
        prompts: of the model; a placeholder wants an image, and a line has none.
    """
    terminal = out.isatty()
    _ask(terminal)
    for line in lines:
        prompt = line.rstrip("\r\n")
        if prompt:
            try:
                if prompts.asks_for_images(prompt):
                    prompts.prompt(prompt, [], "--interactive")  # raises what is wrong
                write_request(engine, tokenizer, replace(request, prompt=prompt), out)
            except ValueError as error:
                if not is_user_error(error) or isinstance(error, OutOfDeviceMemory):
                    raise
                print(f"error: {error}", file=sys.stderr, flush=True)
        _ask(terminal)
    metrics = engine.metrics
    return f"{metrics.submitted:,} continuations, {metrics.generated_tokens:,} tokens added"


def _ask(terminal: bool) -> None:
    if terminal:
        print("> ", end="", file=sys.stderr, flush=True)
