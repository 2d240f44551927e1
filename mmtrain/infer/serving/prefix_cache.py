"""The prefix cache: states and pages after the beginnings of prompts, so that these are read once.

A kept prefix is a copy of the states after exactly its tokens, in a slot of its own, and a share in the pages of its
keys. The last page may be partly filled: whoever continues copies it, and the document that it came from goes on
writing behind it.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from mmtrain.infer.serving.cache_memory import CacheMemory
from mmtrain.vision.prompt_images import PromptImages


@dataclass(frozen=True)
class KeptPrefix:
    """Beginning of a prompt.

    Attributes:
        length: tokens.
        slot: holds the states after them.
        pages: hold their keys.
    """

    length: int
    slot: int
    pages: tuple[int, ...]


class PrefixCache:
    """Kept prefixes, of which the least recently used goes first.

    Two prefixes are the same where all their tokens are, and the pixels and layouts of their images: they are told
    apart by 256 bits of BLAKE2.
    """

    def __init__(self, memory: CacheMemory) -> None:
        self._memory = memory
        self._kept: OrderedDict[bytes, KeptPrefix] = OrderedDict()
        self._lengths: Counter[int] = Counter()
        self._owned: Counter[int] = Counter()  # shares of kept prefixes in each page

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, tokens: Sequence[int], longest: int, images: PromptImages | None = None) -> KeptPrefix | None:
        """Return the longest kept beginning of these tokens, of at most `longest`, as used just now."""
        found, hasher, done = None, blake2b(digest_size=32), 0
        for length in sorted(length for length in self._lengths if length <= longest):
            hasher.update(_bytes(tokens, done, length, images))
            done = length
            if (key := hasher.digest()) in self._kept:
                found = key
        if found is None:
            return None
        self._kept.move_to_end(found)
        return self._kept[found]

    def keep(self, tokens: Sequence[int], slot: int, pages: Sequence[int], images: PromptImages | None = None) -> None:
        """Keep the states of a slot, and pages, as those after exactly these tokens."""
        key = blake2b(_bytes(tokens, 0, len(tokens), images), digest_size=32).digest()
        if key in self._kept:
            self._kept.move_to_end(key)
            return
        memory = self._memory
        if not memory.kept and not self.drop_oldest():
            return
        kept = KeptPrefix(len(tokens), memory.kept.pop(), tuple(pages[: memory.plan.pages_of(len(tokens))]))
        memory.copy_slot(slot, kept.slot)
        memory.pages.share(kept.pages)
        self._kept[key] = kept
        self._lengths[kept.length] += 1
        self._owned.update(kept.pages)

    def drop_oldest(self) -> bool:
        """Drop the least recently used prefix; tells whether there was one."""
        if not self._kept:
            return False
        _, gone = self._kept.popitem(last=False)
        self._memory.kept.append(gone.slot)
        self._memory.pages.release(gone.pages)
        self._owned.subtract(gone.pages)
        self._owned = +self._owned
        self._lengths[gone.length] -= 1
        self._lengths = +self._lengths
        return True

    def clear(self) -> None:
        """Drop all of them."""
        while self.drop_oldest():
            pass

    def reclaimable(self) -> int:
        """Return how many pages would be free if all prefixes were dropped: those that nobody else owns."""
        owners = self._memory.pages.owners
        return sum(owners[page] == count for page, count in self._owned.items())


def _bytes(tokens: Sequence[int], start: int, stop: int, images: PromptImages | None) -> bytes:
    if images is not None:
        return images.key_bytes(tokens, start, stop)
    return array("q", tokens[start:stop]).tobytes()
