"""Figures of kernels: busy time of overlapping ones, kinds, pauses, and communication that nothing hides."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from mmtrain.log.kernel_times import COMMUNICATION, KINDS, OTHER, Gap, KernelTime, KernelTimes, kernel_times, kind_of
from mmtrain.log.operator_times import OURS, operator_kind
from tests.kernels.test_compiles_for_hopper import jit_functions

NCCL, GEMM, NORM = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "nvjet_tst_128x256", "rms_norm_forward_kernel"
MS = 1_000_000


def times(*runs: tuple[str, int, int]) -> KernelTimes:
    """Kernels by name, beginning and end in ms."""
    made = (KernelTime(name, begin * MS, end * MS, stream) for stream, (name, begin, end) in enumerate(runs))
    return KernelTimes(tuple(sorted(made, key=lambda run: run.begin)))


def test_busy_time_counts_overlaps_once() -> None:
    inside, beside, apart = (GEMM, 10, 12), (NORM, 15, 30), (NORM, 40, 45)
    found = times((GEMM, 0, 20), inside, beside, apart)
    assert found.busy_seconds == pytest.approx(0.035) and found.idle_seconds == pytest.approx(0.010)
    assert sum(one.seconds for one in found.by_kind().values()) == pytest.approx(0.042)  # each kernel for itself


def test_nothing_ran() -> None:
    none = KernelTimes(())
    assert (none.busy_seconds, none.idle_seconds, none.exposed_communication_seconds) == (0, 0, 0)
    assert none.gaps() == [] and none.by_kind() == {}


def test_kinds_are_summed_the_longest_first() -> None:
    found = times((NORM, 0, 1), (NORM, 1, 3), (GEMM, 3, 9)).by_kind()
    assert list(found) == ["matrix products", "norms"]
    assert found["norms"].launches == 2 and found["norms"].seconds == pytest.approx(0.003)
    by_name = times((NORM, 0, 1), (GEMM, 1, 3)).by_name()
    assert list(by_name) == [GEMM, NORM] and by_name[GEMM].launches == 1


@pytest.mark.parametrize(
    ("computing", "exposed"),
    [([], 10), ([(0, 10)], 0), ([(2, 5)], 7), ([(5, 20)], 5), ([(0, 3), (2, 4), (8, 9)], 5), ([(10, 20)], 10)],
)
def test_communication_is_exposed_where_nothing_computes(computing: list[tuple[int, int]], exposed: int) -> None:
    found = times((NCCL, 0, 10), *((GEMM, begin, end) for begin, end in computing))
    assert found.exposed_communication_seconds == pytest.approx(exposed / 1e3)


def test_two_communications_at_once_are_exposed_once() -> None:
    assert times((NCCL, 0, 10), (NCCL, 5, 12)).exposed_communication_seconds == pytest.approx(0.012)


def test_gaps_name_what_ended_last_and_what_came_next() -> None:
    found = times((GEMM, 0, 20), (NORM, 5, 10), (NCCL, 23, 24), (NORM, 25, 26))
    assert found.gaps() == [Gap(pytest.approx(0.003), GEMM, NCCL), Gap(pytest.approx(0.001), NCCL, NORM)]
    assert found.gaps(least=0.002) == found.gaps()[:1]


def test_only_what_the_device_ran_counts() -> None:
    def event(device: DeviceType, annotation: bool, start: int) -> SimpleNamespace:
        values = {"name": GEMM, "start_ns": start, "duration_ns": 5, "device_type": device, "device_resource_id": 7}
        values["is_user_annotation"] = annotation
        return SimpleNamespace(**{name: lambda value=value: value for name, value in values.items()})

    events = [event(DeviceType.CUDA, False, 30), event(DeviceType.CPU, False, 0), event(DeviceType.CUDA, True, 0),
              event(DeviceType.CUDA, False, 10)]  # fmt: skip
    results = SimpleNamespace(events=lambda: events)
    found = kernel_times(SimpleNamespace(profiler=SimpleNamespace(kineto_results=results)))
    assert found.runs == (KernelTime(GEMM, 10, 15, 7), KernelTime(GEMM, 30, 35, 7))


KIND_OF_FOLDER = {
    "common": "norms", "cross_entropy": "loss", "embedding": "embedding", "int8_weights": "matrix products",
    "largest": "choice of tokens", "lightning": "lightning attention", "moe": "routing", "norm": "norms",
    "norm_gate": "norms", "peers": COMMUNICATION, "rope": "RoPE", "router": "routing",
    "softmax": "softmax attention", "swiglu": "SwiGLU",
}  # fmt: skip


def test_each_of_our_kernels_has_its_kind_and_a_name_of_its_own() -> None:
    kernels = [name.split(".") for name, _ in jit_functions() if name.endswith("_kernel")]
    assert len(kernels) > 30
    found = {".".join(parts): kind_of(parts[-1]) for parts in kernels}
    assert found == {".".join(parts): KIND_OF_FOLDER[parts[1]] for parts in kernels}
    assert OTHER not in found.values()
    twice = {name: count for name, count in Counter(parts[-1] for parts in kernels).items() if count > 1}
    assert twice == {}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (NCCL, COMMUNICATION),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_nn>", "matrix products"),
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cutlass::layout::NoPermute, Copy_Atom>>",
         "matrix products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::half_t>>", "softmax attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "softmax attention"),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
        ("void at::native::bfloat16_copy_kernel_cuda", "copies"),
        ("void multi_tensor_apply_kernel<TensorListMetadata<4>, FusedAdamMathFunctor<float, 4>>", "optimizer"),
        ("void multi_tensor_apply_kernel<TensorListMetadata<1>, LpNormFunctor<float, NormType::L2>>", "optimizer"),
        ("void at::native::vectorized_elementwise_kernel<4, AddFunctor<float>>", OTHER),
        ("void at::native::_scatter_gather_elementwise_kernel<128, 8>", OTHER),
        ("void f<MatrixProperties>", OTHER),
    ],
)  # fmt: skip
def test_kinds_of_others_kernels(name: str, kind: str) -> None:
    assert kind_of(name) == kind and (kind in KINDS or kind == OTHER)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mm", "matrix products"), ("aten::addmm", "matrix products"), ("aten::bmm", "matrix products"),
        ("aten::_grouped_mm", "matrix products"), ("gloo:all_reduce", COMMUNICATION),
        ("aten::_fused_adamw_", "optimizer"), ("aten::linalg_vector_norm", "optimizer"), ("_NormBackward", "norms"),
        ("_PermuteBackward", OURS), ("PackedAttention", OURS), ("AddBackward0", OTHER), ("aten::mul", OTHER),
        ("detach", OTHER), ("autograd::engine::evaluate_function: MmBackward0", OTHER),
    ],
)  # fmt: skip
def test_kinds_of_operators(name: str, kind: str) -> None:
    assert operator_kind(name) == kind


def test_own_time_of_operators_is_without_those_they_call() -> None:
    from mmtrain.log.kernel_times import profiled
    from mmtrain.log.operator_times import operator_times

    a = torch.randn(256, 256)
    profiler = profiled(lambda: torch.nn.functional.linear(a, a), "cpu")
    found = operator_times(profiler)
    assert found["matrix products"].launches == 1 and kernel_times(profiler).runs == ()
    assert sum(one.seconds for one in found.values()) < 10
