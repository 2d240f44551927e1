"""The one thread that an engine belongs to: it takes requests from others, steps, and tells the news.

Of the engine it uses `submit`, `cancel`, `step`, `unfinished`, `broken_off`, `metrics` and `occupancy` alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import NamedTuple, Protocol

from mmtrain.errors import ConfigError
from mmtrain.infer.endpoint.refusal import Refusal
from mmtrain.infer.serving.generation import Generation, GenerationRequest, Progress
from mmtrain.infer.serving.metrics import EngineMetrics, Occupancy
from mmtrain.infer.serving.runner import StepOutOfMemory

_DEAD = Refusal(500, "the engine failed; the server ends", code="engine_failed")


class SteppedEngine(Protocol):
    """What is stepped: :class:`~mmtrain.infer.engine.Engine`, or one that takes other ranks along."""

    metrics: EngineMetrics
    broken_off: list[int]

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""

    @property
    def occupancy(self) -> Occupancy:
        """Requests at work and waiting, and the memory that is used."""

    def enter_thread(self) -> None:
        """Go over to the calling thread."""

    def submit(self, request: GenerationRequest) -> int:
        """Take a request; returns its number."""

    def cancel(self, number: int) -> Generation:
        """End a request."""

    def step(self) -> list[Progress]:
        """Take all requests further."""


class Event(NamedTuple):
    """News of a job: of its request of that index, or the end of all of them.

    Attributes:
        index: of the request within its job.
        news: of it; None with `failure`.
        failure: why the job ends here.
    """

    index: int
    news: Progress | None
    failure: Refusal | None = None


@dataclass(eq=False)
class Job:
    """Requests that come and end together.

    Attributes:
        requests: of the engine.
        deliver: is given the events of a step; called in the engine's thread, so it must only hand them on.
        numbers: of those that are unfinished, with their index. Belongs to the engine's thread.
    """

    requests: Sequence[GenerationRequest]
    deliver: Callable[[list[Event]], None]
    numbers: dict[int, int] = field(default_factory=dict)


class Books(NamedTuple):
    """Figures of an engine after a step; a copy, so that any thread may read it."""

    counts: dict[str, int]
    occupancy: Occupancy


class EngineThread:
    """Owner of an engine.

    A step that does not fit into memory, or that gives no finite numbers, ends the jobs that were in it; the others go
    on. After any other error the engine's state is not to be trusted: it is left alone, and all jobs fail, later ones
    too.

    Attributes:
        books: figures after the last step.

    Args:
        engine: touched by nobody else from now on.
        warn: is told, as a line, of steps that failed.
        died: is called in the thread, with the error, when the engine is not to be trusted any more.
    """

    def __init__(
        self, engine: SteppedEngine, warn: Callable[[str], None], died: Callable[[BaseException], None]
    ) -> None:
        self._engine, self._warn, self._died = engine, warn, died
        self._orders: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._jobs: dict[int, Job] = {}
        self._ending, self._dead = False, False
        self.books = self._read_books()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Let a job's requests wait for the engine. From any thread, as the following."""
        self._orders.put(lambda: self._submit(job))

    def cancel(self, job: Job) -> None:
        """End what is unfinished of a job, and free what it holds; it is told nothing more."""
        self._orders.put(lambda: self._cancel(job))

    def ask(self, order: Callable[[], None]) -> None:
        """Have a function called in the thread, between two steps."""
        self._orders.put(order)

    def stop(self) -> None:
        """End all jobs, and wait for the thread to end."""
        self._orders.put(self._end)
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._engine.enter_thread()
            while not self._ending:
                self._obey()
                if self._engine.unfinished and not self._ending:
                    self._step()
                self.books = self._read_books()
            self._fail(list(self._jobs), Refusal(503, "the server is shutting down", code="shutting_down"))
            self.books = self._read_books()
        except BaseException as error:
            self._died(error)
            self._dead = True
            for job in set(self._jobs.values()):
                job.deliver([Event(0, None, _DEAD)])
            while not self._ending:
                self._orders.get()()

    def _obey(self) -> None:
        """Carry out the orders that are there; with nothing to step, wait for one."""
        try:
            self._orders.get(block=not self._engine.unfinished)()
            while True:
                self._orders.get_nowait()()
        except Empty:
            pass

    def _step(self) -> None:
        try:
            news = self._engine.step()
        except StepOutOfMemory as error:
            self._warn(f"a step failed, its requests were answered 503: {error}")
            failure = Refusal(503, "the device's memory is not enough for what came together; try again, or shorter",
                              code="out_of_memory", headers={"Retry-After": "1"})  # fmt: skip
            self._fail(self._engine.broken_off, failure)
            return
        except ConfigError as error:
            self._warn(f"a step failed, its requests were answered 500: {error}")
            self._fail(self._engine.broken_off, Refusal(500, str(error), code="not_finite"))
            return
        self.books = self._read_books()  # first, so that who has its answer finds it counted
        self._tell(news)

    def _tell(self, news: Iterable[Progress]) -> None:
        """Hand every job its news of a step."""
        events: dict[Job, list[Event]] = {}
        for one in news:
            job = self._jobs[one.id]
            events.setdefault(job, []).append(Event(job.numbers[one.id], one))
            if one.generation is not None:
                del self._jobs[one.id], job.numbers[one.id]
        for job, told in events.items():
            job.deliver(told)

    def _submit(self, job: Job) -> None:
        if self._dead:
            job.deliver([Event(0, None, _DEAD)])
            return
        try:
            for index, request in enumerate(job.requests):
                number = self._engine.submit(request)
                self._jobs[number], job.numbers[number] = job, index
        except ConfigError as error:
            self._cancel(job)
            job.deliver([Event(0, None, Refusal(400, str(error), code="refused"))])

    def _cancel(self, job: Job) -> None:
        if self._dead:
            return
        for number in list(job.numbers):
            self._engine.cancel(number)
            del self._jobs[number], job.numbers[number]

    def _fail(self, numbers: Iterable[int], failure: Refusal) -> None:
        """End the jobs that these requests belong to."""
        for job in {self._jobs[number] for number in numbers}:
            self._cancel(job)
            job.deliver([Event(0, None, failure)])

    def _end(self) -> None:
        self._ending = True

    def _read_books(self) -> Books:
        metrics = self._engine.metrics
        counts = {name: value for name, value in vars(metrics).items() if not isinstance(value, bool)}
        return Books(counts, self._engine.occupancy)
