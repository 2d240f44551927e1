"""The inference engine: many requests at once, from one model on one device, or on ranks that share weights or keys.

    engine = Engine(model, tokenizer)
    made = engine.generate([GenerationRequest(tuple(tokenizer.encode("def ")), max_tokens=32)])
    logprobs = engine.score(tokenizer.encode("def main():"))

A step takes every request at work one token further, reads a bounded number of tokens of prompts beside them, and lets
finished requests go and waiting ones in. It is the model of training that runs, in evaluation mode (no expert drops a
token), through the kernels of training. An engine belongs to one thread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count

import torch

from mmdata.tokenizer import Tokenizer
from mmtrain.errors import ConfigError
from mmtrain.infer.context.group import ContextParallel
from mmtrain.infer.context.runner import ContextRunner
from mmtrain.infer.serving.admission import check_request_size, look_once
from mmtrain.infer.serving.device_memory import take_memory
from mmtrain.infer.serving.document import Document, Status
from mmtrain.infer.serving.document_images import check_images
from mmtrain.infer.serving.generation import Finish, Generation, GenerationRequest, Progress
from mmtrain.infer.serving.memory_plan import MemoryPlan
from mmtrain.infer.serving.metrics import EngineMetrics, Occupancy
from mmtrain.infer.serving.options import EngineOptions
from mmtrain.infer.serving.ranks import ALONE, Ranks
from mmtrain.infer.serving.reading import read_by_context, reading_requests
from mmtrain.infer.serving.runner import PathResult, Runner
from mmtrain.infer.serving.sampler import Sampler
from mmtrain.infer.serving.scheduler import Scheduler, Step
from mmtrain.infer.serving.scoring import note_scores
from mmtrain.infer.serving.stop import text_of
from mmtrain.model.model import HybridLM
from mmtrain.vision.prompt_images import PromptImages


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)


def _say_nothing(line: str) -> None:
    """Other ranks say the same."""


class Engine:
    """Continues and scores texts.

    Attributes:
        metrics: counts of what was done.
        memory: pages and slots, and who owns them.
        broken_off: numbers of the requests whose step failed, after :meth:`step` has raised.

    Args:
        model: on one device, whole or this rank's part; it is put into evaluation mode. The dtype of its weights is
            that of the keys.
        tokenizer: of its training, for texts and their ends; None gives ids alone.
        options: sizes; the defaults suit one GPU.
        warn: is told what the user should know, as a line; with `context`, on the first rank alone.
        ranks: the processes that the model is laid over; each has an engine of its own, and all are asked the same
            (`mmtrain.infer.serving.follow`).
        context: in place of `ranks`, those that share out the keys of all requests. Each has an engine with the same
            weights, and makes the same calls in the same order (docs/inference.md).

    Raises:
        ConfigError: an option makes no sense, memory is not enough for one request, or a mixer cannot be served.
        RanksDiffer: ranks have different models or options.
    """

    def __init__(
        self, model: HybridLM, tokenizer: Tokenizer | None = None, options: EngineOptions | None = None,
        warn: Callable[[str], None] = _warn, ranks: Ranks = ALONE, context: ContextParallel | None = None,
    ) -> None:  # fmt: skip
        options = EngineOptions() if options is None else options
        options.validate()
        if context is not None:
            context.validate(ranks)
            warn = warn if context.rank == 0 else _say_nothing
        self.metrics, self._ranks = EngineMetrics(), ranks
        self._model, self._tokenizer, self._options, self._warn = model.eval(), tokenizer, options, warn
        self.memory = take_memory(model, options, ranks, context)
        self._scheduler = Scheduler(self.memory, options, self.metrics)
        vocab_size = model.config.vocab_size if tokenizer is None else tokenizer.vocab_size
        if context is None:
            self._runner = Runner(model, self.memory, options, vocab_size, ranks)
        else:
            self._runner = ContextRunner(model, self.memory, options, vocab_size, context)
        self._eod_id = None if tokenizer is None else tokenizer.eod_id
        self._sampler = Sampler(vocab_size, self._eod_id, ranks)
        self.broken_off: list[int] = []
        self._documents: dict[int, Document] = {}
        self._ids = count(1)

    @property
    def plan(self) -> MemoryPlan:
        """Pages and slots that were planned."""
        return self.memory.plan

    @property
    def unfinished(self) -> int:
        """Requests that wait, run or are paused."""
        return len(self._documents)

    @property
    def occupancy(self) -> Occupancy:
        """Requests at work and waiting, and the memory that is used."""
        plan, memory, running = self.plan, self.memory, len(self._scheduler.running)
        return Occupancy(self.unfinished - running, running, plan.pages, plan.pages - memory.pages.free, plan.running,
                         plan.running - len(memory.running), plan.kept - len(memory.kept))  # fmt: skip

    @property
    def at_work(self) -> bool:
        """Whether a step has anything to do: requests wait or run, and are not all paused."""
        return bool(self._scheduler.waiting or self._scheduler.running)

    def enter_thread(self) -> None:
        """Go over to the calling thread, where it is another than the one that made the engine: GPUs are a thread's."""
        if self.memory.device.type == "cuda":
            torch.cuda.set_device(self.memory.device)

    def submit(self, request: GenerationRequest) -> int:
        """Take a request; returns its number. It waits until there is room: :meth:`why_waiting` says what for.

        Raises:
            RequestRefused: it could never be served; the message says which size can. Or its images do not fit its
                placeholders or into the device's memory, or the model has no eyes.
            ConfigError: a value of its sampling is out of range.
            OutOfDeviceMemory: its images do not fit, where other ranks share the weights: the process must end.
        """
        try:
            request.validate(self._model.config.vocab_size)
            check_images(request, self._model.config)
            self.check_size(request)
            seen = look_once(request, self._model, self.memory.device, self._ranks)
        except ConfigError:
            self.metrics.refused += 1
            raise
        self.metrics.image_tiles += 0 if request.images is None else len(request.images.tiles_N3SS)
        text = None if self._tokenizer is None else text_of(self._tokenizer, request)
        document = Document(next(self._ids), request, list(request.tokens), text, images=seen)
        document.reason = "has not been looked at yet"
        self._documents[document.id] = document
        self._scheduler.waiting.append(document)
        self.metrics.submitted += 1
        return document.id

    def step(self) -> list[Progress]:
        """Take all requests at work further, and return the news; empty if there is nothing to do.

        Raises:
            StepOutOfMemory: the step does not fit into the device's memory; its requests are read again in the next.
            OutOfDeviceMemory: likewise, where the model is laid over several ranks: the process must end.
            ConfigError: the weights give logits that are not finite numbers.
            RanksDiffer: ranks serve different requests.
        """
        step = self._scheduler.schedule()
        if not (step.prefill or step.decode):
            return []
        try:
            return self._carry_out(step)
        except BaseException:
            self.broken_off = [document.id for document, _ in (*step.decode, *step.prefill)]
            self._scheduler.set_back(step)
            raise

    def _carry_out(self, step: Step) -> list[Progress]:
        results = self._runner.run(step)
        self.metrics.steps += 1
        self.metrics.prefill_tokens += sum(chunk.count for chunk in step.prefill)
        self.metrics.decode_tokens += len(step.decode)
        chunks = [*step.prefill, *step.decode]
        for document, tokens in chunks:
            document.computed += tokens
        if self._scheduler.prefixes is not None:
            for document, _ in chunks:
                self._scheduler.keep_prefix(document)
            if line := self.metrics.prefix_warning(self._options.warn_after):
                self._warn(line)
        return [news for result in results for news in self._take(result)]

    def stream(
        self, requests: Iterable[GenerationRequest], place_of: dict[int, int] | None = None
    ) -> Iterator[Progress]:
        """Serve requests and yield their news as it comes; their numbers follow one another in the order given.

        All are submitted before the first step. Those that are not finished when the iterator is closed are cancelled.
        One stream at a time: what its steps bring of requests that were submitted otherwise is not told.

        Args:
            requests: any number.
            place_of: is given the place among the requests, from 0 on, of each number.

        Raises:
            RequestRefused, ConfigError: as :meth:`submit` and :meth:`step`; none of these requests is left behind.
        """
        own: set[int] = set()
        try:
            for place, request in enumerate(requests):
                number = self.submit(request)
                own.add(number)
                if place_of is not None:
                    place_of[number] = place
            while own:
                if not self.at_work:
                    raise ConfigError("request", min(own), "is paused, and nothing else is left", "resume it")
                for news in self.step():
                    if news.id in own:
                        if news.generation is not None:
                            own.discard(news.id)
                        yield news
        finally:
            for number in own & self._documents.keys():  # others ended in the step whose news were being told
                self.cancel(number)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Serve requests to their end, and return what they made in the order given.

        Raises:
            RequestRefused, ConfigError: as :meth:`stream`.
        """
        asked = (replace(request, stream_text=False) for request in requests)
        done = {news.id: news.generation for news in self.stream(asked) if news.generation is not None}
        return [done[number] for number in sorted(done)]

    def score(self, tokens: Sequence[int], start: int = 1) -> list[float]:
        """Return log p(token | those before it) of each token from place `start` on, in nats.

        Args:
            tokens: ids of a text.
            start: 1 at least. What lies before it is the context: the prefix cache keeps it, so that several
                continuations of one context read it once.

        Raises:
            RequestRefused: there are too many tokens, or none.
        """
        return self.score_all([tokens], [start])[0]

    def score_all(self, texts: Sequence[Sequence[int]], starts: Sequence[int] | None = None) -> list[list[float]]:
        """Score several texts at once, each as :meth:`score`; without `starts`, from their second token on."""
        return [made.prompt_logprobs for made in self.read_all(texts, starts)]

    def read_all(
        self,
        texts: Sequence[Sequence[int]],
        starts: Sequence[int] | None = None,
        images: Sequence[PromptImages | None] | None = None,
    ) -> list[Generation]:
        """Score several texts as :meth:`score_all`; each result has `prompt_logprobs` and `prompt_likeliest`.

        Args:
            texts, starts: see there.
            images: of each text; None: text alone.
        """
        return read_by_context(reading_requests(texts, starts, images), self.generate, self.plan.kept)

    def cancel(self, number: int) -> Generation:
        """End a request, free what it holds, and return what it made.

        Raises:
            ConfigError: no such request, or it has ended.
        """
        document = self._find(number)
        self.metrics.cancelled += 1
        document.break_off()
        return self._end(document, Finish.CANCELLED)

    def pause(self, number: int) -> None:
        """Take a request's memory away until it is resumed; what it made stays.

        Raises:
            ConfigError: no such request, or it has ended.
        """
        document = self._find(number)
        if document.status != Status.PAUSED:
            self._scheduler.release(document)
            document.status, document.reason = Status.PAUSED, "was paused"

    def resume(self, number: int) -> None:
        """Let a paused request go on as soon as there is room: its tokens are read again, and it goes on the same.

        Raises:
            ConfigError: no such request, or it has ended.
        """
        document = self._find(number)
        if document.status == Status.PAUSED:
            self._scheduler.put_back(document, "was resumed")

    def why_waiting(self, number: int) -> str:
        """Say what a request waits for; empty if it is at work.

        Raises:
            ConfigError: no such request, or it has ended.
        """
        document = self._find(number)
        if document.status == Status.WAITING and document is not self._scheduler.waiting[0]:
            return f"{self._scheduler.waiting.index(document)} requests are before it"
        return document.reason

    def clear_prefixes(self) -> None:
        """Forget all kept prefixes: their pages and slots are free."""
        if self._scheduler.prefixes is not None:
            self._scheduler.prefixes.clear()

    def check_size(self, request: GenerationRequest) -> None:
        """Refuse a request that could never be served here.

        Raises:
            RequestRefused: it has more tokens than the planned memory holds, or stop texts without a tokenizer.
        """
        check_request_size(request, self.plan, self._tokenizer is not None)

    def _find(self, number: int) -> Document:
        if number not in self._documents:
            raise ConfigError("request", number, "no such request is unfinished", "submit it")
        return self._documents[number]

    def _take(self, result: PathResult) -> list[Progress]:
        """Note what a path gave: scores of prompts, and the next tokens, with which documents go on or end."""
        if result.scores is not None:
            note_scores(result.scored, result.scores)
        if not result.documents:
            return []
        choices = self._sampler.choose(result.documents, result.logits_NV)
        news, added, eod_id = list[Progress](), 0, self._eod_id
        for document, token, logprob, top in zip(result.documents, *choices, strict=True):
            belongs, text, finish = document.add(token, logprob, eod_id, top)
            made = None if finish is None else self._end(document, finish)
            self.metrics.finished += finish is not None
            added += belongs
            news.append(Progress(document.id, token if belongs else None, text, made))
        self.metrics.generated_tokens += added
        return news

    def _end(self, document: Document, finish: Finish) -> Generation:
        self._scheduler.release(document)
        document.status, document.made.finish = Status.FINISHED, finish
        del self._documents[document.id]
        return document.made
