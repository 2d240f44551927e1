"""Answers of a loaded model to offline evaluations: continuations by decoding, log-probabilities by forward passes.

It is what `mmtrain.evals.answering.Answerer` asks for. Legend: T tokens, S tokens of this rank (T here), D model width,
V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdata.tokenizer import Tokenizer
from mmtrain.errors import ConfigError
from mmtrain.infer.generate import Prefix, decode, generate, never_chosen, read_prefix
from mmtrain.infer.load import load_for_decoding
from mmtrain.infer.memory import is_out_of_memory
from mmtrain.infer.sampling import Sampling
from mmtrain.model.loss import IGNORE
from mmtrain.model.model import HybridLM
from mmtrain.model.packed_seq import Packing

_REST = 2048  # tokens of a row after those that it shares: their logits are held at once


class DecodingAnswerer:
    """Answers one prompt, or one row, after the other.

    A row that is scored alone goes through the model in one pass, as in training, and its logits are made in chunks
    (`model.loss_chunk_tokens`). Of rows that begin alike the beginning is read once, as a prompt is.

    Args:
        model: as :func:`~mmtrain.infer.load.load_weights` returns it; its score of labels is replaced.
        tokenizer: the one it was trained with.
    """

    def __init__(self, model: HybridLM, tokenizer: Tokenizer) -> None:
        self._model, self._eod = model, tokenizer.eod_id
        self._never = never_chosen(model, tokenizer, ignore_eod=False)
        self._device = model.embed_tokens.weight.device
        scoring: Any = token_log_probs  # the model returns whatever it is told to score with
        model.label_score = scoring

    def generate(self, prompts: Sequence[np.ndarray], max_tokens: int) -> list[list[int]]:
        """Return the likeliest continuation of each prompt, without an end-of-document token.

        Raises:
            ConfigError: a prompt does not fit into memory, or the logits are not finite numbers.
        """
        greedy = Sampling()
        return [
            list(generate(self._model, self._ids(prompt), max_tokens, greedy, eod_id=self._eod, never=self._never))
            for prompt in prompts
        ]

    @torch.no_grad()
    def score(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the log-probabilities of each row's second to last tokens, float32 [T - 1].

        Raises:
            ConfigError: a row does not fit into memory, or the logits are not finite numbers.
        """
        shared = _shared(rows) if len(rows) > 1 else 0
        if shared == 0 or max(map(len, rows)) - shared > _REST:
            return [self._whole(self._ids(row)) for row in rows]
        prefix = read_prefix(self._model, self._ids(rows[0][:shared]))
        before = self._whole(self._ids(rows[0][:shared])) if shared > 1 else np.empty(0, dtype=np.float32)
        return [np.concatenate([before, self._rest(prefix.copy(), self._ids(row[shared:]))]) for row in rows]

    def _ids(self, tokens: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.int64)).to(self._device)

    def _whole(self, tokens_T: Tensor) -> np.ndarray:
        labels_T = torch.cat([tokens_T[1:], tokens_T.new_tensor([IGNORE])])
        packing = Packing.from_lengths([len(tokens_T)], self._device)
        try:
            found_T: Any = self._model(tokens_T, packing, labels_T, score=True)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise ConfigError("--lengths", f"{len(tokens_T):,} tokens", f"do not fit into the memory of {self._device}",
                              "give shorter ones, or another --device") from None  # fmt: skip
        return _finite(found_T[:-1])

    def _rest(self, prefix: Prefix, tokens_T: Tensor) -> np.ndarray:
        """Log-probabilities of tokens that follow a prefix, [T]."""
        if not len(tokens_T):
            return np.empty(0, dtype=np.float32)
        logits_TV = prefix.logits_V[None]
        if len(tokens_T) > 1:
            logits_TV = torch.cat([logits_TV, decode(self._model, tokens_T[:-1], prefix.cache)])
        found_TV = logits_TV.float().log_softmax(-1)
        return _finite(found_TV.gather(1, tokens_T[:, None])[:, 0])


def open_answerer(path: Path, device: str | None = None) -> tuple[DecodingAnswerer, Tokenizer]:
    """Read the newest checkpoint at or below a path, and return what answers for it, and its tokenizer.

    Args:
        path: a run folder, one of its checkpoints, or a Hugging Face folder.
        device: as :func:`~mmtrain.infer.device.choose_device` takes it.

    Raises:
        ConfigError: as :func:`~mmtrain.infer.load.load_for_decoding` raises it.
    """
    model, tokenizer = load_for_decoding(Path(path), device=device)
    return DecodingAnswerer(model, tokenizer), tokenizer


def token_log_probs(x_SD: Tensor, weight_VD: Tensor, labels_T: Tensor, chunk_tokens: int) -> Tensor:
    """Return log softmax(W x)[label] of each token, fp32 [T], 0 where the label is -100 (IGNORE).

    Args:
        x_SD: final hidden states, S = T.
        weight_VD: the language-model head.
        labels_T: int64.
        chunk_tokens: C; logits of so many tokens are held at once.
    """
    parts = []
    for x_CD, labels_C in zip(x_SD.split(chunk_tokens), labels_T.split(chunk_tokens), strict=True):
        logits_CV = (x_CD @ weight_VD.t()).float()
        label_C = logits_CV.gather(1, labels_C.clamp(min=0)[:, None])[:, 0]
        parts.append(torch.where(labels_C == IGNORE, 0.0, label_C - logits_CV.logsumexp(1)))
    return torch.cat(parts)


def _shared(rows: Sequence[np.ndarray]) -> int:
    """Number of tokens with which all rows begin; the last token of a row is never among them."""
    least = min(map(len, rows)) - 1
    table = np.stack([row[:least] for row in rows])
    differs = (table != table[0]).any(axis=0)
    return int(np.argmax(differs)) if differs.any() else least


def _finite(found_T: Tensor) -> np.ndarray:
    if not torch.isfinite(found_T).all():
        raise ConfigError("checkpoint", "its weights", "give logits that are not finite numbers: its run diverged",
                          "take an earlier checkpoint")  # fmt: skip
    return found_T.cpu().numpy()
