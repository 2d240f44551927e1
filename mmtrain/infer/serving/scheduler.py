"""Which documents a step continues, by how many tokens, and who gets the memory for it.

Every running document that lacks one token is decoded in every step. Beside them a step reads at most `prefill_tokens`
tokens of longer ones, oldest first, then of those that wait. A document that needs a page when none is left takes it
from the prefix cache, then from the youngest document, which is read again later.
"""

from __future__ import annotations

from array import array
from collections import deque
from typing import NamedTuple

from mmtrain.infer.serving.cache_memory import CacheMemory
from mmtrain.infer.serving.document import Document, Status
from mmtrain.infer.serving.metrics import EngineMetrics
from mmtrain.infer.serving.options import EngineOptions
from mmtrain.infer.serving.prefix_cache import KeptPrefix, PrefixCache
from mmtrain.infer.serving.standing import Standing


class Chunk(NamedTuple):
    """Tokens of a document that go through the model in one step: `count` from its computed ones on."""

    document: Document
    count: int

    @property
    def completes(self) -> bool:
        """Whether the next token is known after it."""
        return self.count == self.document.remaining


class Step(NamedTuple):
    """The two paths of a step: documents that read several tokens, and those that lack one."""

    prefill: list[Chunk]
    decode: list[Chunk]


class Scheduler:
    """Queue of documents, and owner of what those at work hold.

    Attributes:
        waiting: first come, first served; those that were put back come first.
        running: in the order in which they began.
        prefixes: the prefix cache; None where it is off.
    """

    def __init__(self, memory: CacheMemory, options: EngineOptions, metrics: EngineMetrics) -> None:
        self.waiting: deque[Document] = deque()
        self.running: list[Document] = []
        self.prefixes = PrefixCache(memory) if memory.plan.kept else None
        self._memory, self._options, self._metrics = memory, options, metrics
        self._plan_anew()

    def schedule(self) -> Step:
        """Choose a step, and give its documents their pages; it is empty if nothing waits or runs."""
        prefill: list[Chunk] = []
        budget, preempted = self._options.prefill_tokens, False
        if not self._standing.holds(self.running):
            self._decode, preempted = self._decode_chunks()
            alike = len(self._decode) == len(self.running)
            self._standing = Standing(self.running if alike else (), self._memory.plan)
            for document in self.running:
                if document.remaining > 1 and budget:
                    prefill.append(Chunk(document, self._piece(document, budget)))
                    budget -= prefill[-1].count
        decode = list(self._decode)
        while self.waiting and budget and not preempted and self._begin(self.waiting[0]):
            document = self.waiting.popleft()
            self.running.append(document)
            chunk = Chunk(document, self._piece(document, budget))
            (prefill if document.remaining > 1 else decode).append(chunk)
            budget -= chunk.count
        return Step(prefill, decode)

    def release(self, document: Document) -> None:
        """Take a document from wherever it is, and all that it holds from it."""
        if document.status == Status.RUNNING:
            self._plan_anew()
            self.running.remove(document)
            self._memory.pages.release(document.pages)
            assert document.slot is not None
            self._memory.running.append(document.slot)
        elif document.status == Status.WAITING:
            self.waiting.remove(document)
        document.slot, document.pages, document.computed = None, array("q"), 0

    def put_back(self, document: Document, reason: str) -> None:
        """Let a document that holds nothing wait, before all others."""
        document.status, document.reason = Status.WAITING, reason
        self.waiting.appendleft(document)

    def set_back(self, step: Step) -> None:
        """Let a step's documents begin anew: it broke off, and some layers' states may have gone on without others'."""
        for document, _ in reversed([*step.prefill, *step.decode]):
            if document.status == Status.RUNNING:
                self.release(document)
                self.put_back(document, "its step broke off")

    def keep_prefix(self, document: Document) -> None:
        """Keep a document's states in the prefix cache if it stands at one of its boundaries."""
        if self.prefixes is None or document.computed > document.prompt_length:
            return
        if document.computed in self._boundaries(document):
            tokens = document.tokens[: document.computed]
            assert document.slot is not None
            self.prefixes.keep(tokens, document.slot, document.pages, document.prompt_images)

    def _plan_anew(self) -> None:
        """Forget the last decode step that was planned: the next is another."""
        self._standing, self._decode = Standing((), self._memory.plan), list[Chunk]()

    def _decode_chunks(self) -> tuple[list[Chunk], bool]:
        """Documents that lack one token, each with a page for it, and whether one had to give its memory up."""
        chunks, before = [], self._metrics.preempted
        for document in list(self.running):
            if document.status == Status.RUNNING and document.remaining == 1 and self._grow(document):
                chunks.append(Chunk(document, 1))
        return chunks, self._metrics.preempted > before

    def _grow(self, document: Document) -> bool:
        """Give a running document the pages of its tokens; False if it was the one to give its memory up."""
        missing = self._memory.plan.pages_of(len(document.tokens)) - len(document.pages)
        if missing <= 0:
            return True
        while missing > self._memory.pages.free:
            if self.prefixes is not None and self.prefixes.reclaimable():
                self.prefixes.drop_oldest()
                continue
            youngest = self.running[-1]
            self.release(youngest)
            self.put_back(youngest, "gave its pages to an older request")
            self._metrics.preempted += 1
            if youngest is document:
                return False
        document.pages.extend(self._memory.pages.take(missing))
        return True

    def _piece(self, document: Document, budget: int) -> int:
        """Tokens that a document reads now: to the end of the budget or to its next boundary."""
        done = document.computed
        following = (edge for edge in self._boundaries(document) if edge > done) if self.prefixes is not None else ()
        edge = next(iter(following), len(document.tokens))
        return min(budget, edge - done, document.remaining)

    def _boundaries(self, document: Document) -> list[int]:
        """Lengths of a prompt's beginnings that are to be kept, ascending.

        The interval is doubled until a prompt takes half of the slots at most: long ones leave room for others.
        """
        step, length = self._options.prefix_interval, document.prompt_length
        if step is None:
            return sorted(document.request.keep_prefix)
        while length // step > max(1, self._memory.plan.kept // 2):
            step *= 2
        return sorted({*range(step, length + 1, step), *document.request.keep_prefix})

    def _begin(self, document: Document) -> bool:
        """Give a waiting document a slot and the pages of all its tokens; False if they are not there."""
        if not self._memory.running:
            document.reason = f"all {self._memory.plan.running} requests that may run at once do"
            return False
        longest = min(len(document.tokens) - 1, document.unscored.start)
        prefix = None
        if self.prefixes is not None:
            prefix = self.prefixes.find(document.tokens, longest, document.prompt_images)
        if not self._take_memory(document, prefix):
            # With nothing at work, only the pages of the prefix itself can be in the way.
            if self.running or not self._take_memory(document, None):
                return False
            prefix = None
        if self.prefixes is not None:
            self._metrics.prefix_lookups += 1
            self._metrics.prefix_lookup_tokens += document.prompt_length
            self._metrics.prefix_hits += prefix is not None
            self._metrics.prefix_hit_tokens += min(document.computed, document.prompt_length)
        document.status, document.reason = Status.RUNNING, ""
        return True

    def _take_memory(self, document: Document, prefix: KeptPrefix | None) -> bool:
        memory = self._memory
        shared = [] if prefix is None else list(prefix.pages)
        whole = len(shared) if prefix is None else prefix.length // memory.plan.page_tokens
        needed = memory.plan.pages_of(min(len(document.tokens) + 1, document.most)) - min(whole, len(shared))
        memory.pages.share(shared)  # so that making room does not free them
        if not self._make_room(needed):
            document.reason = f"needs {needed} pages of {memory.plan.page_tokens} tokens, {memory.pages.free} are free"
            memory.pages.release(shared)
            return False
        document.slot = memory.running.pop()
        document.pages = array("q", shared[:whole] + memory.pages.take(needed))
        document.computed = 0 if prefix is None else prefix.length
        document.made.prefix_tokens = document.computed
        if prefix is None:
            memory.begin(document.slot)
            return True
        memory.copy_slot(prefix.slot, document.slot)
        for page in shared[whole:]:  # partly filled: its owner writes on behind the prefix
            memory.copy_page(page, document.pages[whole])
        memory.pages.release(shared[whole:])
        return True

    def _make_room(self, needed: int) -> bool:
        """Drop prefixes until so many pages are free; none if that would not be enough."""
        free = self._memory.pages.free
        if needed > free and (self.prefixes is None or needed > free + self.prefixes.reclaimable()):
            return False
        while self.prefixes is not None and needed > self._memory.pages.free:
            self.prefixes.drop_oldest()
        return True
