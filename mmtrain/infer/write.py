"""Writing of continuations as they are decoded, and the line that sums them up."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TextIO

import torch

from mmdata.tokenizer import Tokenizer
from mmtrain.infer.generate import generate, never_chosen, prompt_ids, read_prefix
from mmtrain.infer.request import Request
from mmtrain.infer.text_stream import TextStream
from mmtrain.model.model import HybridLM

# What a terminal would obey, escape sequences among it, as text; a model may write anything.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


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


def write_samples(model: HybridLM, tokenizer: Tokenizer, request: Request, out: TextIO) -> Summary:
    """Write each continuation, token by token; several ones below a line each that names the sample and its seed.

    Args:
        model: in evaluation mode, whole, on one device.
        tokenizer: the one it was trained with.
        request: checked already.
        out: where the text goes; for a terminal, control characters are spelt out.

    Raises:
        ConfigError: the prompt has no token or does not fit into memory, or the weights give no finite logits.
    """
    ids = prompt_ids(tokenizer, request.prompt)
    began = time.perf_counter()
    prefix = read_prefix(model, torch.tensor(ids, device=model.embed_tokens.weight.device))
    read = time.perf_counter()
    never = never_chosen(model, tokenizer, request.ignore_eod)
    controls = _CONTROLS if out.isatty() else {}
    tokens = ended = 0
    for sample in range(request.samples):
        seed = request.seed + sample
        if request.samples > 1:
            out.write(f"{chr(10) * (sample > 0)}--- sample {sample + 1} of {request.samples}, seed {seed}\n")
        out.write(request.prompt.translate(controls) if request.echo else "")
        out.flush()
        stream, count = TextStream(tokenizer, ids), 0
        start = prefix.copy() if sample + 1 < request.samples else prefix
        made = generate(
            model, start, request.max_tokens, request.sampling, eod_id=tokenizer.eod_id, seed=seed, never=never
        )
        for token in made:
            count += 1
            if text := stream.push(token):
                out.write(text.translate(controls))
                out.flush()
        out.write(f"{stream.finish().translate(controls)}\n")
        out.flush()
        tokens, ended = tokens + count, ended + (count < request.max_tokens)
    return Summary(len(ids), tokens, ended, request.samples, read - began, time.perf_counter() - read)


def _tokens(count: int) -> str:
    return f"{count:,} token{'s' * (count != 1)}"
