"""Serving of a file of prompts: a JSON line for each, in their order, written as soon as it is known."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from mmdata.tokenizer import Tokenizer
from mmtrain.errors import ConfigError
from mmtrain.infer.engine import Engine
from mmtrain.infer.prompts_file import PromptLine
from mmtrain.infer.request import Request
from mmtrain.infer.serving.generation import Generation, GenerationRequest

if TYPE_CHECKING:
    from mmtrain.vision.prompts import ImagePrompts, SeenPrompt

_IMAGES_AT_ONCE = 256  # lines: embeddings of so many images of 2,340 tokens and 6,144 numbers take 7 GB in bf16


class AskedLines(NamedTuple):
    """What the lines of a file ask for.

    Attributes:
        lines: of the file.
        requests: of each, without its images.
        seen: of each, its prompt with images whose pixels wait in their files; None without any.
    """

    lines: Sequence[PromptLine]
    requests: list[GenerationRequest]
    seen: list[SeenPrompt | None]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(len(one.tokens) + one.max_tokens for one in self.requests)

    def with_images(self, place: int) -> GenerationRequest:
        """Return a request with its images, decoded; its text is made once.

        Raises:
            ConfigError: one cannot be decoded; the message names the line.
        """
        request, seen = replace(self.requests[place], stream_text=False), self.seen[place]
        if seen is None:
            return request
        try:
            return replace(request, images=seen.images())
        except ConfigError as error:
            raise _of_line(self.lines[place], error) from None


def requests_of(
    lines: Sequence[PromptLine], tokenizer: Tokenizer, default: Request, prompts: ImagePrompts, chat: bool = False
) -> AskedLines:
    """Return what lines ask for; images are looked at, and not decoded.

    Args:
        lines: of a file.
        tokenizer: of the model.
        default: of the command.
        prompts: makes those with images.
        chat: write every prompt as the user's turn.

    Raises:
        ConfigError: a line asks for what no engine of this vocabulary serves; the message names it.
    """
    made, found = [], []
    for line in lines:
        try:
            found.append(seen := line.seen(prompts, chat))
            made.append(line.request(tokenizer, default, None if seen is None else seen.tokens))
            made[-1].validate(tokenizer.vocab_size)
        except ConfigError as error:
            raise _of_line(line, error) from None
    return AskedLines(lines, made, found)


def write_batch(engine: Engine, asked: AskedLines, out: TextIO) -> str:
    """Serve all lines and write a JSON line for each; returns a line that sums them up.

    Of lines with images a bounded number is served at once: their pixels and embeddings are held until they are done.

    Args:
        engine: with nothing else to do.
        asked: as :func:`requests_of` returns it.
        out: where the lines go.

    Raises:
        ConfigError: a request does not fit into the engine's memory, before anything is written; or an image cannot be
            decoded, when its turn comes.
    """
    began, (lines, requests, seen) = time.perf_counter(), asked
    for line, request in zip(lines, requests, strict=True):
        try:
            engine.check_size(request)
        except ConfigError as error:
            raise _of_line(line, error) from None
    at_once = _IMAGES_AT_ONCE if any(one is not None for one in seen) else len(lines)
    for first in range(0, len(lines), at_once):
        _write_some(engine, asked, range(first, min(first + at_once, len(lines))), out)
    seconds, metrics = time.perf_counter() - began, engine.metrics
    return (
        f"{len(lines):,} prompts in {seconds:.2f} s: {metrics.prefill_tokens + metrics.decode_tokens:,} tokens read, "
        f"{metrics.generated_tokens:,} added ({metrics.generated_tokens / max(seconds, 1e-9):.1f} tokens/s), "
        f"{metrics.prefix_hit_rate:.0%} of prompts from the prefix cache"
    )


def _write_some(engine: Engine, asked: AskedLines, places: range, out: TextIO) -> None:
    """Serve some of the lines, and write theirs."""
    takes_all = (getattr(out, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"  # or escapes
    done: dict[int, Generation] = {}
    place_of: dict[int, int] = {}
    written = 0
    for news in engine.stream(map(asked.with_images, places), place_of):
        if news.generation is None:
            continue
        done[place_of[news.id]] = news.generation
        while written in done:
            place = places[written]
            record = _record(asked.lines[place], asked.requests[place], done.pop(written))
            out.write(json.dumps(record, ensure_ascii=not takes_all) + "\n")
            out.flush()
            written += 1


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
