"""Writing of one prompt's continuations as they are decoded, and the line that sums them up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TextIO

from mmdata.tokenizer import Tokenizer
from mmtrain.errors import ConfigError
from mmtrain.infer.engine import Engine
from mmtrain.infer.prompt import prompt_ids
from mmtrain.infer.request import Request
from mmtrain.infer.serving.generation import Finish, Generation, GenerationRequest, Progress
from mmtrain.infer.serving.options import EngineOptions
from mmtrain.infer.serving.runner import StepOutOfMemory
from mmtrain.model.model import HybridLM
from mmtrain.vision.prompt_images import PromptImages
from mmtrain.vision.prompts import SeenPrompt

# What a terminal would obey, escape sequences among it, as text; a model may write anything.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}
_AT_ONCE = 16  # samples


@dataclass(frozen=True)
class Summary:
    """What was done for a request.

    Attributes:
        prompt_tokens: length of the prompt.
        tokens: tokens added, over all samples.
        ended: samples that came to the end of their document.
        samples: samples made.
        prompt_seconds, seconds: time that the prompt took, and the tokens.
    """

    prompt_tokens: int
    tokens: int
    ended: int
    samples: int
    prompt_seconds: float
    seconds: float

    def __str__(self) -> str:
        rate = self.tokens / self.seconds if self.seconds > 0 else 0.0
        which = "" if self.samples == 1 else f" in {self.ended} of {self.samples} samples"
        return (
            f"{_tokens(self.prompt_tokens)} of prompt in {self.prompt_seconds:.2f} s, {_tokens(self.tokens)} added in "
            f"{self.seconds:.2f} s ({rate:.1f} tokens/s){f', end of document{which}' if self.ended else ''}"
        )


def write_samples(
    model: HybridLM, tokenizer: Tokenizer, request: Request, out: TextIO, options: EngineOptions | None = None
) -> Summary:
    """Write each continuation, token by token; several ones below a line each that names the sample and its seed.

    Args:
        model: in evaluation mode, whole, on one device.
        tokenizer: the one it was trained with.
        request: checked already.
        out: where the text goes; for a terminal, control characters are spelt out.
        options: of the engine; None plans it for this request.

    Raises:
        ConfigError: the prompt has no token or does not fit into memory, or the weights give no finite logits.
    """
    if options is None:
        options = options_for(request, len(prompt_ids(tokenizer, request.prompt)))
    return write_request(Engine(model, tokenizer, options), tokenizer, request, out)


def write_request(
    engine: Engine, tokenizer: Tokenizer, request: Request, out: TextIO, seen: SeenPrompt | None = None
) -> Summary:
    """:func:`write_samples` with an engine that is there already.

    Args:
        engine: of the model.
        tokenizer, request, out: see there.
        seen: the prompt with its images, in place of the request's own.

    Raises:
        ConfigError: see there.
    """
    ids = prompt_ids(tokenizer, request.prompt) if seen is None else list(seen.tokens)
    images = None if seen is None else seen.images()
    began = time.perf_counter()
    writer = _Writer(out, request)
    made: list[Generation] = []
    read = began
    try:
        for sample, news in _progress(engine, ids, request, images):
            read = time.perf_counter() if not made and read == began else read
            writer.take(sample, news)
            made += [news.generation] if news.generation is not None else []
    except StepOutOfMemory:
        where = f"does not fit into the memory of {engine.memory.device}"
        raise ConfigError("--prompt", f"{len(ids):,} tokens", where,
                          "give a shorter one, or another --device") from None  # fmt: skip
    ended = sum(one.finish == Finish.EOD for one in made)
    tokens = sum(len(one.tokens) for one in made)
    return Summary(len(ids), tokens, ended, request.samples, read - began, time.perf_counter() - read)


def options_for(request: Request, prompt_tokens: int) -> EngineOptions:
    """Return the sizes of an engine that serves this request alone; its samples share what was read of the prompt."""
    return EngineOptions(
        max_running=min(request.samples, _AT_ONCE),
        prefix_slots=int(request.samples > 1),
        prefix_interval=None,
        longest=prompt_tokens + request.max_tokens,
    )


def _progress(
    engine: Engine, ids: list[int], request: Request, images: PromptImages | None
) -> Iterator[tuple[int, Progress]]:
    """News of all samples, by their number from 0; the first one reads the prompt for all."""
    keep = (len(ids) - 1,) if request.samples > 1 and len(ids) > 1 else ()

    def asked(sample: int) -> GenerationRequest:
        return GenerationRequest(
            tuple(ids), request.max_tokens, request.sampling, seed=request.seed + sample, stop=request.stop,
            ignore_eod=request.ignore_eod, keep_prefix=keep, images=images,
        )  # fmt: skip

    sample_of = {engine.submit(asked(0)): 0}
    waiting = list(range(1, request.samples))
    try:
        while sample_of:
            for news in engine.step():
                sample = sample_of[news.id]
                if news.generation is not None:
                    del sample_of[news.id]
                yield sample, news
                sample_of |= {engine.submit(asked(sample)): sample for sample in waiting}
                waiting = []
    finally:
        for number in sample_of:
            engine.cancel(number)


class _Writer:
    """Output in the order of samples: that of the first unfinished one at once, that of later ones when it is theirs.

    Attributes:
        turn: the sample whose text is written as it comes.
    """

    def __init__(self, out: TextIO, request: Request) -> None:
        self.turn = 0
        self._out, self._request = out, request
        self._controls = _CONTROLS if out.isatty() else {}
        self._held: dict[int, str] = {}
        self._ended: set[int] = set()
        self._begun = False

    def take(self, sample: int, news: Progress) -> None:
        """Write or hold a sample's new text; nothing is written before there is any news."""
        if not self._begun:
            self._begun = True
            self._begin()
        self._held[sample] = self._held.get(sample, "") + news.text
        if news.generation is not None:
            self._ended.add(sample)
        while self.turn < self._request.samples:
            text, ended = self._held.pop(self.turn, ""), self.turn in self._ended
            if text or ended:
                self._out.write(f"{text.translate(self._controls)}{chr(10) * ended}")
                self._out.flush()
            if not ended:
                return
            self.turn += 1
            self._begin()

    def _begin(self) -> None:
        request, sample = self._request, self.turn
        if sample == request.samples:
            return
        if request.samples > 1:
            title = f"--- sample {sample + 1} of {request.samples}, seed {request.seed + sample}\n"
            self._out.write(chr(10) * (sample > 0) + title)
        self._out.write(request.prompt.translate(self._controls) if request.echo else "")
        self._out.flush()


def _tokens(count: int) -> str:
    return f"{count:,} token{'s' * (count != 1)}"
