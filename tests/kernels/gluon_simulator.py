"""Runs the Gluon kernels on a CPU: each program as plain Python over torch tensors, with the machine's asynchrony.

Triton's interpreter does not know Gluon. Layouts mean nothing here; what is asynchronous does. A copy fills shared
memory when a wait says so and holds NaN until then; a product is computed when it is waited for, and its operands must
still be what they were when it was asked for; shared memory that was written is not read by a product before a fence.
Races between threads are not seen.

Warps with roles of their own (`warp_specialize`) are threads of which one runs at a time, until it comes to a barrier.
What a barrier stands for comes when its phase is complete, and not before: tiles that the copy engine brings hold NaN
until then.
"""

from __future__ import annotations

import threading
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl

LAYOUTS = "BlockedLayout", "SliceLayout", "DotOperandLayout", "NVMMADistributedLayout", "SwizzledSharedLayout"


class Pointer:
    """Address of an element of a tensor's storage, or a tensor of such addresses."""

    def __init__(self, memory: Tensor, offset: Tensor) -> None:
        self.memory, self.offset = memory, offset

    @property
    def dtype(self) -> Any:
        return types.SimpleNamespace(element_ty=self.memory.dtype)

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


class Crew:
    """Threads that stand for warps with roles: the one that holds the lock runs."""

    PATIENCE = 20.0  # seconds that nothing happens, after which it is a deadlock

    def __init__(self) -> None:
        self.turn = threading.Condition()
        self.errors: list[BaseException] = []

    def run(self, roles: list[tuple[Callable, tuple]]) -> None:
        threads = [threading.Thread(target=self._play, args=role, daemon=True) for role in roles]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def _play(self, function: Callable, args: tuple) -> None:
        with self.turn:
            try:
                function(*args)
            except BaseException as error:
                self.errors.append(error)
            self.turn.notify_all()

    def give_way(self) -> None:
        """Let the others run, who may do what they waited for before this thread does anything else."""
        self.turn.wait(0.001)

    def wait_for(self, ready: Callable[[], bool]) -> None:
        done = self.turn.wait_for(lambda: ready() or bool(self.errors), self.PATIENCE)
        assert not self.errors, "another warp failed"
        assert done, "all warps wait"


class Barrier:
    """A barrier in shared memory: phases, each of which waits for arrivals and for bytes."""

    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.phase = 0
        self.coming: list[tuple[Shared, Tensor]] = []

    def index(self, index: Any) -> Barrier:
        assert int(index) == 0
        return self

    def arrive(self, crew: Crew, arrivals: int = 1, expected: int = 0, came: int = 0) -> None:
        self.missing -= arrivals
        self.bytes += expected - came
        assert self.missing >= 0, "more arrivals than the barrier waits for"
        if self.missing == 0 and self.bytes == 0:
            for target, values in self.coming:
                target.data.copy_(values)
            self.coming, self.missing, self.phase = [], self.count, self.phase + 1
            crew.turn.notify_all()


class Barriers:
    """A list of them."""

    def __init__(self, count: int) -> None:
        self.made = [Barrier() for _ in range(count)]

    def index(self, index: Any) -> Barrier:
        return self.made[int(index)]


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

    def __init__(self, program: int, programs: int) -> None:
        self.program, self.programs = program, programs
        self.copies: list[tuple[Shared, Tensor, Tensor]] = []
        self.groups: deque[list[tuple[Shared, Tensor, Tensor]]] = deque()
        self._products: dict[int, deque[Product]] = {}  # by thread
        self.unfenced: set[int] = set()
        self.crew = Crew()

    @property
    def products(self) -> deque[Product]:
        """Those under way of the warps that ask."""
        return self._products.setdefault(threading.get_ident(), deque())

    def allocate_shared_memory(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared | Barriers:
        if layout == "barriers":
            return Barriers(shape[0])
        return Shared(torch.full(shape, float("nan"), dtype=dtype), self.unfenced)

    def copy_async(self, target: Shared, source: Pointer, mask: Any) -> None:
        mask = torch.as_tensor(mask).expand_as(target.data)
        self.check_free(target)
        self.copies.append((target, source.load(mask), mask))
        target.data[mask] = float("nan")

    def check_free(self, target: Shared) -> None:
        """No product under way reads it."""
        products = [product for queue in self._products.values() for product in queue]
        assert all(target.data.data_ptr() != x.data.data_ptr() for p in products for x in (p.a, p.b)
                   if isinstance(x, Shared)), "a copy into what a product reads"  # fmt: skip

    def copy_tile(self, desc: Any, at: list[Any], barrier: Barrier, target: Shared) -> None:
        """A tile by the copy engine: zeros outside of the tensor."""
        self.check_free(target)
        (row, column), (rows, columns) = (int(x) for x in at), desc.block_shape
        assert column * desc.base.element_size() % 16 == 0, "the copy engine wants columns at 16 bytes"
        whole = torch.as_strided(desc.base.detach(), desc.shape, desc.strides)
        values = torch.zeros(rows, columns, dtype=target.data.dtype)
        low, high = max(row, 0), min(row + rows, desc.shape[0])
        wide = min(columns, desc.shape[1] - column)
        if high > low:
            values[low - row : high - row, :wide] = whole[low:high, column : column + wide]
        target.data.fill_(float("nan"))
        barrier.coming.append((target, values))
        barrier.arrive(self.crew, 0, came=values.numel() * values.element_size())

    def init_barrier(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.missing = count

    def arrive_at(self, barrier: Barrier) -> None:
        barrier.arrive(self.crew)
        self.crew.give_way()

    def wait_barrier(self, barrier: Barrier, phase: Any) -> None:
        self.crew.wait_for(lambda: barrier.phase % 2 != int(phase))

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
            num_programs=lambda axis: self.programs,
            warp_specialize=lambda roles, *sizes: self.crew.run(roles),
            constexpr=lambda x: x,
            arange=lambda lo, hi, layout=None: torch.arange(lo, hi),
            zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
            where=lambda c, a, b: torch.where(wide(c), wide(a), wide(b)),
            minimum=lambda a, b: torch.minimum(wide(a), wide(b)),
            maximum=lambda a, b: torch.maximum(wide(a), wide(b)),
            max=lambda x, axis: x.amax(axis),
            sum=lambda x, axis: x.sum(axis),
            log2=lambda x: torch.log2(wide(x)),
            exp2=lambda x: torch.exp2(wide(x).float()),
            cast=lambda x, dtype: wide(x).to(dtype),
            load=lambda pointer, mask=None, other=0: pointer.load(mask, other),
            store=lambda pointer, value, mask=None: pointer.store(value, mask),
            convert_layout=lambda x, layout: x,
            allocate_shared_memory=self.allocate_shared_memory,
            static_range=range,
            range=lambda *a, **k: range(*a),
            NVMMASharedLayout=types.SimpleNamespace(get_default_for=lambda *a: None),
            **dict.fromkeys(LAYOUTS, _nothing),
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
            "mbarrier": types.SimpleNamespace(
                MBarrierLayout=lambda: "barriers",
                init=lambda barrier, count: self.init_barrier(barrier, count),
                expect=lambda barrier, size: barrier.arrive(self.crew, 1, expected=int(size)),
                arrive=self.arrive_at,
                wait=self.wait_barrier,
            ),
            "copy_tile": self.copy_tile,
            "warpgroup_mma": self.mma,
            "warpgroup_mma_wait": self.mma_wait,
            "_INTERPRETED": True,
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
            elif isinstance(value, (gl.constexpr, tl.constexpr)):
                own[name] = value.value
            elif hasattr(value, "fn") and isinstance(value.fn, types.FunctionType):
                own[name] = as_python(value, names, done)
        return made
    return done[id(plain)]


class Simulated:
    """A kernel that is launched like one of Triton's, and runs its programs one after the other."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, maxnreg: int = 0, **constants: Any) -> None:
            self.launches += 1
            for program in range(grid[0]):
                pointers = [Pointer.to(x) if isinstance(x, Tensor) else x for x in args]
                as_python(self.kernel, Machine(program, grid[0]).globals(), {})(*pointers, **constants)

        return launch
