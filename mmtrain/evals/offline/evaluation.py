"""One evaluation of one checkpoint: checked as a whole before weights are read, then run and written."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from mmdata.prepare_images.template import Template
from mmdata.tokenizer import Tokenizer
from mmdata.tokenizer_identity import TokenizerIdentity
from mmtrain import __version__
from mmtrain.config import ModelConfig
from mmtrain.errors import ConfigError
from mmtrain.evals.answering import Answerer
from mmtrain.evals.haystack import Haystack
from mmtrain.evals.offline.checkpoint import checkpoint_meta, held_out_text, identity, run_of
from mmtrain.evals.offline.request import IMAGES, EvalRequest
from mmtrain.evals.offline.run import SampleLog, longest_of, run_units
from mmtrain.evals.offline.summary import summarise
from mmtrain.evals.offline.units import list_units
from mmtrain.evals.offline.write import SAMPLES, name_of, write_results
from mmtrain.evals.ruler.prompt import Kit
from mmtrain.vision.prompts import ImagePrompts, template_of_run

FOLDER = "evals"
"""Of a run, where results lie unless another folder is named."""


class Evaluation:
    """A request for a checkpoint whose weights have not been read.

    Args:
        request: checked by itself.
        checkpoint: its folder.
        model: its model.
        tokenizer: the one it was trained with.
        trained_with: that tokenizer's identity, where it is on record.
        corpus: path of a corpus with held-out text; None takes that of the run.
        precision: that the model computes in, for the results.
        template: of turns, for questions on images; None: as the run's corpora write them, or the usual one.

    Attributes:
        units: samples, none of which is kept.
        longest: tokens of the longest one with its answer.

    Raises:
        ConfigError: held-out text is needed and is not there, a file is damaged, or a length is too short.
        DataError: the corpus is damaged or not there.
    """

    def __init__(
        self, request: EvalRequest, checkpoint: Path, model: ModelConfig, tokenizer: Tokenizer,
        trained_with: TokenizerIdentity | None, corpus: str | None, precision: str = "fp32",
        template: Template | None = None,
    ) -> None:  # fmt: skip
        self._request, self._checkpoint = request, checkpoint
        self._identity = {**identity(checkpoint, model, tokenizer.vocab_size), "precision": precision}
        self._text: dict[str, Any] = {}
        haystack = None
        if needing := request.needs_text():
            found = held_out_text(checkpoint, corpus, model.vocab_size, trained_with)
            if found is None:
                problem = f"is needed for {', '.join(needing)}: the run's corpus is not found"
                raise ConfigError("--corpus", None, problem, "give a prepared corpus that has a held-out part")
            haystack = Haystack(found[1], found[0], tokenizer, model.vocab_size)
            self._text = {"corpus": found[0], "tokens": haystack.num_tokens}
        prompts, self._turns = None, {}
        if IMAGES in request.tasks:
            if model.vision is None:
                raise ConfigError("--tasks", IMAGES, "the model has no eyes", "give a checkpoint of one that has")
            prompts = ImagePrompts(tokenizer, model, template or template_of_run(checkpoint_meta(checkpoint)))
            self._turns = {"turns": asdict(prompts.template)}
        self.units = list_units(request, Kit(tokenizer, haystack), prompts)
        self.longest = longest_of(self.units, request)

    def folder(self, out: Path | None) -> Path:
        """Return the folder of the results, and make it.

        Args:
            out: that is wanted; None is the run's `evals`.

        Raises:
            ConfigError: the checkpoint is in no run's folder, or the folder cannot be written.
        """
        run = run_of(self._checkpoint)
        if out is None and run is None:
            raise ConfigError("--out", None, f"is needed: {self._checkpoint} is in no run's folder", "give a folder")
        folder = out if out is not None or run is None else run / FOLDER
        assert folder is not None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError("--out", folder, f"cannot be made ({error.strerror})", "give another folder") from None
        if not os.access(folder, os.W_OK):
            raise ConfigError("--out", folder, "cannot be written", "give another folder")
        return folder

    def line(self) -> str:
        """Return what is to be done, in one line."""
        lengths = ", ".join(f"{length:,}" for length in self._request.lengths)
        text = f", text of {self._text['corpus']} ({self._text['tokens']:,} tokens)" if self._text else ""
        return (
            f"{len(self.units)} samples of {', '.join(self._request.tasks)}{f' at {lengths}' if lengths else ''}{text}"
        )

    def run(
        self, answerer: Answerer, folder: Path, batch: int, done: Callable[[dict[str, Any]], None], device: str
    ) -> tuple[dict[str, Any], list[Path]]:
        """Ask the model and write what comes of it.

        Args:
            answerer: the model.
            folder: as :meth:`folder` returns it.
            batch: samples that are asked at once.
            done: is told of each sample's record.
            device: for the results.

        Returns:
            The results, and the files.

        Raises:
            ConfigError: what the answerer raises.
            OSError: files cannot be written.
        """
        began = datetime.now(UTC).isoformat(timespec="seconds")
        name = name_of(self._request, self._identity, {**self._text, **self._turns})
        records = run_units(self.units, answerer, self._request, SampleLog(folder / f"{name}{SAMPLES}"), batch, done)
        result = {
            "checkpoint": self._identity, "request": self._request.record(), "text": self._text, "began": began,
            **self._turns, "device": device, "versions": {"mmtrain": __version__, "numpy": np.__version__},
            **summarise(records), "samples": records,
        }  # fmt: skip
        return result, write_results(folder, name, result)
