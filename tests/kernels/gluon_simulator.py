"""Runs the Gluon kernels on a CPU: each program as plain Python over torch tensors, with the machine's asynchrony.

Triton's interpreter does not know Gluon. Layouts mean nothing here; what is asynchronous does. A copy fills shared
memory when a wait says so and holds NaN until then; a product is computed when it is waited for, and its operands must
still be what they were when it was asked for; shared memory that was written is not read by a product before a fence.
Races between threads are not seen.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Pointer:
    """Address of an element of a tensor's storage, or a tensor of such addresses."""

    def __init__(self, memory: Tensor, offset: Tensor) -> None:
        self.memory, self.offset = memory, offset

    @classmethod
    def to(cls, x: Tensor) -> Pointer:
        whole = torch.as_strided(x.detach(), (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
        return cls(whole, torch.tensor(x.storage_offset()))

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + other)

    def _inside(self, mask: Any) -> tuple[Tensor, Tensor]:
        offset = torch.as_tensor(self.offset)
        mask = torch.ones_like(offset, dtype=torch.bool) if mask is None else torch.as_tensor(mask).expand_as(offset)
        outside = mask & ((offset < 0) | (offset >= self.memory.numel()))
        assert not outside.any(), "an access outside of the tensor's storage"
        return torch.where(mask, offset, 0), mask

    def load(self, mask: Any = None, other: Any = 0) -> Tensor:
        offset, mask = self._inside(mask)
        return torch.where(mask, self.memory[offset], torch.as_tensor(other, dtype=self.memory.dtype))

    def store(self, value: Any, mask: Any = None) -> None:
        offset, mask = self._inside(mask)
        value = torch.as_tensor(value, dtype=self.memory.dtype).expand_as(offset)
        self.memory[offset[mask]] = value[mask]


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, data: Tensor, unfenced: set[int]) -> None:
        self.data, self.unfenced = data, unfenced

    def index(self, index: Any) -> Shared:
        return Shared(self.data[int(index)], self.unfenced)

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order), self.unfenced)

    def load(self, layout: Any) -> Tensor:
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)
        self.unfenced.add(self.data.data_ptr())


class Product:
    """One product under way."""

    def __init__(self, a: Any, b: Shared, acc: Tensor, use_acc: bool) -> None:
        for x in (a, b):
            assert not (isinstance(x, Shared) and x.data.data_ptr() in x.unfenced), "a product reads before a fence"
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc
        self.before = [self._read(x).clone() for x in (a, b)]
        self.value: Tensor | None = None

    @staticmethod
    def _read(x: Any) -> Tensor:
        return x.data if isinstance(x, Shared) else x

    def finish(self) -> None:
        for x, before in zip((self.a, self.b), self.before, strict=True):
            assert torch.equal(self._read(x).nan_to_num(7e7), before.nan_to_num(7e7)), "overwritten under a product"
        product = self.before[0].float() @ self.before[1].float()
        self.value = self.acc + product if self.use_acc else product


class Machine:
    """What a program calls: the functions of ``gl``, ``tl`` and Hopper that our kernels use."""

    def __init__(self, program: int) -> None:
        self.program = program
        self.copies: list[tuple[Shared, Tensor, Tensor]] = []
        self.groups: deque[list[tuple[Shared, Tensor, Tensor]]] = deque()
        self.products: deque[Product] = deque()
        self.unfenced: set[int] = set()

    def allocate_shared_memory(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        return Shared(torch.full(shape, float("nan"), dtype=dtype), self.unfenced)

    def copy_async(self, target: Shared, source: Pointer, mask: Any) -> None:
        mask = torch.as_tensor(mask).expand_as(target.data)
        assert all(target.data.data_ptr() != x.data.data_ptr() for p in self.products for x in (p.a, p.b)
                   if isinstance(x, Shared)), "a copy into what a product reads"  # fmt: skip
        self.copies.append((target, source.load(mask), mask))
        target.data[mask] = float("nan")

    def commit_group(self) -> None:
        self.groups.append(self.copies)
        self.copies = []

    def wait_group(self, outstanding: int) -> None:
        while len(self.groups) > outstanding:
            for target, values, mask in self.groups.popleft():
                target.data[mask] = values[mask]
                self.unfenced.add(target.data.data_ptr())

    def fence(self) -> None:
        self.unfenced.clear()

    def mma(self, a: Any, b: Shared, acc: Tensor, *, use_acc: bool = True, is_async: bool = False) -> Product:
        assert is_async and isinstance(acc, Tensor), "the accumulator is still under way"
        self.products.append(Product(a, b, acc, use_acc))
        return self.products[-1]

    def mma_wait(self, outstanding: int = 0, *, deps: list[Product]) -> Any:
        while len(self.products) > outstanding:
            self.products.popleft().finish()
        values = [product.value for product in deps]
        assert all(value is not None for value in values), "read while still under way"
        return values[0] if len(values) == 1 else tuple(values)

    def language(self) -> Any:
        """What stands for ``gl`` and ``tl``."""
        wide = torch.as_tensor
        return types.SimpleNamespace(
            program_id=lambda axis: self.program,
            arange=lambda lo, hi, layout=None: torch.arange(lo, hi),
            zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
            where=lambda c, a, b: torch.where(wide(c), wide(a), wide(b)),
            minimum=lambda a, b: torch.minimum(wide(a), wide(b)),
            maximum=lambda a, b: torch.maximum(wide(a), wide(b)),
            max=lambda x, axis: x.amax(axis),
            exp2=lambda x: torch.exp2(wide(x).float()),
            cast=lambda x, dtype: wide(x).to(dtype),
            load=lambda pointer, mask=None, other=0: pointer.load(mask, other),
            store=lambda pointer, value, mask=None: pointer.store(value, mask),
            convert_layout=lambda x, layout: x,
            allocate_shared_memory=self.allocate_shared_memory,
            static_range=range,
            range=lambda *a, **k: range(*a),
            NVMMASharedLayout=types.SimpleNamespace(get_default_for=lambda *a: None),
            **dict.fromkeys(("BlockedLayout", "SliceLayout", "DotOperandLayout", "NVMMADistributedLayout"), _nothing),
            bfloat16=torch.bfloat16, float16=torch.float16, float32=torch.float32,
            int32=torch.int32, int64=torch.int64,
        )  # fmt: skip

    def globals(self) -> dict[str, Any]:
        """Names in a kernel's module that mean something else here."""
        language = self.language()
        return {
            "gl": language,
            "tl": language,
            "copy_async": self.copy_async,
            "async_copy": types.SimpleNamespace(commit_group=self.commit_group, wait_group=self.wait_group),
            "fence_async_shared": self.fence,
            "warpgroup_mma": self.mma,
            "warpgroup_mma_wait": self.mma_wait,
            "_INTERPRETED": True,
            "LOG2E": 1.4426950408889634,
        }


def _nothing(*args: Any) -> None:
    return None


def as_python(function: Any, names: dict[str, Any], done: dict[int, Callable]) -> Callable:
    """A jit function and all it calls, with ``names`` in place of their modules' own."""
    plain = function.fn
    if id(plain) not in done:
        own: dict[str, Any] = dict(plain.__globals__)
        done[id(plain)] = made = types.FunctionType(plain.__code__, own, plain.__name__, plain.__defaults__)
        for name, value in plain.__globals__.items():
            if name in names:
                own[name] = names[name]
            elif hasattr(value, "fn") and isinstance(value.fn, types.FunctionType):
                own[name] = as_python(value, names, done)
        return made
    return done[id(plain)]


class Simulated:
    """A kernel that is launched like one of Triton's, and runs its programs one after the other."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, **constants: Any) -> None:
            self.launches += 1
            for program in range(grid[0]):
                pointers = [Pointer.to(x) if isinstance(x, Tensor) else x for x in args]
                as_python(self.kernel, Machine(program).globals(), {})(*pointers, **constants)

        return launch
