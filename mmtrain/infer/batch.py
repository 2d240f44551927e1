"""Serving of a file of prompts: a JSON line for each, in their order, written as soon as it is known."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, TextIO

from mmdata.tokenizer import Tokenizer
from mmtrain.errors import ConfigError
from mmtrain.infer.engine import Engine
from mmtrain.infer.prompts_file import PromptLine
from mmtrain.infer.request import Request
from mmtrain.infer.serving.generation import Generation, GenerationRequest


def requests_of(lines: Sequence[PromptLine], tokenizer: Tokenizer, default: Request) -> list[GenerationRequest]:
    """Return what lines ask for.

    Raises:
        ConfigError: a line asks for what no engine of this vocabulary serves; the message names it.
    """
    made = []
    for line in lines:
        try:
            made.append(line.request(tokenizer, default))
            made[-1].validate(tokenizer.vocab_size)
        except ConfigError as error:
            raise _of_line(line, error) from None
    return made


def write_batch(engine: Engine, lines: Sequence[PromptLine], requests: Sequence[GenerationRequest], out: TextIO) -> str:
    """Serve all lines and write a JSON line for each; returns a line that sums them up.

    Args:
        engine: with nothing else to do.
        lines: of the file.
        requests: of these, as :func:`requests_of` returns them.
        out: where the lines go.

    Raises:
        ConfigError: a request does not fit into the engine's memory, before anything is written.
    """
    began = time.perf_counter()
    for line, request in zip(lines, requests, strict=True):
        try:
            engine.check_size(request)
        except ConfigError as error:
            raise _of_line(line, error) from None
    done: dict[int, Generation] = {}
    place_of: dict[int, int] = {}
    written = 0
    for news in engine.stream(requests, place_of):
        if news.generation is None:
            continue
        done[place_of[news.id]] = news.generation
        while written in done:
            record = _record(lines[written], requests[written], done.pop(written))
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
            out.flush()
            written += 1
    seconds, metrics = time.perf_counter() - began, engine.metrics
    return (
        f"{written:,} prompts in {seconds:.2f} s: {metrics.prefill_tokens + metrics.decode_tokens:,} tokens read, "
        f"{metrics.generated_tokens:,} added ({metrics.generated_tokens / max(seconds, 1e-9):.1f} tokens/s), "
        f"{metrics.prefix_hit_rate:.0%} of prompts from the prefix cache"
    )


def _record(line: PromptLine, request: GenerationRequest, made: Generation) -> dict[str, Any]:
    record: dict[str, Any] = {
        "id": line.fields.get("id", line.number),
        "text": made.text,
        "finish": made.finish.name.lower(),
        "tokens": made.tokens,
        "prompt_tokens": len(request.tokens),
        "prefix_tokens": made.prefix_tokens,
    }
    if request.logprobs:
        record["logprobs"] = made.logprobs
    if request.prompt_logprobs:
        record["prompt_logprobs"] = made.prompt_logprobs
    return record


def _of_line(line: PromptLine, error: ConfigError) -> ConfigError:
    where = f"line {line.number}, {error.option.removeprefix('request.')} {error.value}"
    return ConfigError("--prompts", where, error.problem, error.fix)
