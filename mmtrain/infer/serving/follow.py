"""One engine on every rank, of which rank 0's is used and the others do the same.

Rank 0 notes what is asked of it, and tells the others before each step: they ask the same of their own engines, in the
same order, and take the same step. Prompts, clients and clocks therefore exist on rank 0 alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from mmdata.tokenizer import Tokenizer
from mmtrain.errors import ConfigError
from mmtrain.infer.context.group import ContextParallel
from mmtrain.infer.engine import Engine
from mmtrain.infer.serving.generation import Generation, GenerationRequest, Progress
from mmtrain.infer.serving.options import EngineOptions
from mmtrain.infer.serving.ranks import Ranks
from mmtrain.model.model import HybridLM

T = TypeVar("T")
Call = tuple[str, tuple[Any, ...]]
"""A method of the engine, and its arguments."""


def run_engine(
    ranks: Ranks,
    model: HybridLM,
    tokenizer: Tokenizer | None,
    options: EngineOptions | None,
    use: Callable[[Engine], T],
    context: ContextParallel | None = None,
) -> T | None:
    """Make an engine on every rank, and let rank 0 use it while the others follow. Collective.

    Args:
        ranks: the processes; a process alone just uses its engine.
        model: this rank's part, laid out over these.
        tokenizer: of the model.
        options: of the engine; rank 0's count.
        use: is called on rank 0 alone, with an engine for one thread.
        context: the same processes, where they share keys and each has all weights.

    Returns:
        What `use` returned, on rank 0; None on the others.

    Raises:
        ConfigError: as :class:`Engine` raises it, on all ranks alike.
        OutOfDeviceMemory: a step did not fit into this rank's memory. The process must end: others wait for it.
    """
    if ranks.size == 1:
        return use(Engine(model, tokenizer, options))
    options = ranks.tell(options)
    if ranks.rank > 0:
        follow(Engine(model, tokenizer, options, warn=lambda line: None, ranks=ranks, context=context), ranks)
        return None
    engine = LeadingEngine(model, tokenizer, options, ranks, context)
    try:
        return use(engine)
    finally:
        engine.let_go()


def follow(engine: Engine, ranks: Ranks) -> None:
    """Do what rank 0 does, step by step, until it lets go."""
    while (calls := ranks.tell(None)) is not None:
        for name, arguments in calls:
            getattr(engine, name)(*arguments)
        try:
            engine.step()
        except ConfigError:
            continue  # rank 0 has the same, and tells it


class LeadingEngine(Engine):
    """The engine of rank 0: every step is taken by all ranks.

    A step that ends with another error than ConfigError may have ended otherwise on other ranks: none follows it.
    """

    def __init__(
        self, model: HybridLM, tokenizer: Tokenizer | None, options: EngineOptions | None, ranks: Ranks,
        context: ContextParallel | None = None,
    ) -> None:  # fmt: skip
        self._calls: list[Call] = []
        self._apart = False
        super().__init__(model, tokenizer, options, ranks=ranks, context=context)

    def submit(self, request: GenerationRequest) -> int:
        """Take a request, as every engine does; the other ranks get it with the next step."""
        number = super().submit(request)
        self._calls.append(("submit", (request,)))
        return number

    def cancel(self, number: int) -> Generation:
        """End a request, as every engine does."""
        made = super().cancel(number)
        self._calls.append(("cancel", (number,)))
        return made

    def pause(self, number: int) -> None:
        """Take a request's memory away until it is resumed."""
        super().pause(number)
        self._calls.append(("pause", (number,)))

    def resume(self, number: int) -> None:
        """Let a paused request go on as soon as there is room."""
        super().resume(number)
        self._calls.append(("resume", (number,)))

    def clear_prefixes(self) -> None:
        """Forget all kept prefixes."""
        super().clear_prefixes()
        self._calls.append(("clear_prefixes", ()))

    def step(self) -> list[Progress]:
        """Let all ranks take a step; without anything to do they are not asked.

        Raises:
            ConfigError: the weights give logits that are not finite numbers.
            OutOfDeviceMemory: the step does not fit into this rank's memory. The process must end: others wait for it.
            RuntimeError: an earlier step ended in another way than it should.
        """
        if self._apart:
            raise RuntimeError("an earlier step broke off on this rank alone: its processes have to be started again")
        if not self.at_work:
            return []
        self._ranks.tell(self._calls)
        self._calls, self._apart = [], True
        try:
            news = super().step()
        except ConfigError:
            self._apart = False
            raise
        self._apart = False
        return news

    def let_go(self) -> None:
        """Let the other ranks end. Ranks that are apart are not waited for: they end with this process."""
        if not self._apart:
            self._ranks.tell(None)
