"""What recorded segments tell autograd where parts are frozen, on a CPU: graphs stand in as the calls that they record.

That recorded graphs give the same bits is tested on GPUs (`tests/gpu/test_frozen_gpu.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmtrain.build import build_model
from mmtrain.model.frozen import freeze
from mmtrain.model.model import ModelInputs
from mmtrain.parallel.graphs import recorded_model
from mmtrain.parallel.graphs.recorded_model import RecordedModel, _load
from mmtrain.parallel.graphs.recorded_segment import RecordedSegment, Recorder
from mmtrain.parallel.graphs.segments import Segment, SegmentInputs, SegmentOutput, run_segments
from mmtrain.parallel.units import UnitWatch
from tests.dist.test_graph_segments import DENSE, MODELS, micro_batch

FROZEN = [
    ("embed_tokens",),
    ("embed_tokens", "layers.[01]"),
    ("layers.*.mixer", "lm_head"),
    ("*", "!norm"),
    ("*", "!layers.2"),
    ("*", "!layers.4.mixer.k_proj"),
]


class CallRecorder(Recorder):
    """A recorder without a device: what is recorded runs."""

    def __init__(self) -> None:
        self._scratch: dict[tuple[int, torch.Size], Tensor] = {}

    @contextmanager
    def record(self) -> Iterator[None]:
        yield


class CalledSegment(RecordedSegment):
    """A recorded segment whose replays call it again, on the same memory."""

    def __init__(
        self, segment: Segment, carried: Sequence[Tensor], wants: Sequence[bool], inputs: SegmentInputs, *rest: object
    ) -> None:
        super().__init__(segment, carried, wants, inputs, *rest)
        self._call = lambda: segment(self._leaves, inputs)
        self.backwards = 0

    def __call__(self, carried: Sequence[Tensor], inputs: SegmentInputs) -> SegmentOutput:
        out = super().__call__(carried, inputs)
        assert [tensor.requires_grad for tensor in out.differentiable] == list(self.wants)
        return out

    def replay_forward(self, carried: Sequence[Tensor]) -> tuple[Tensor, ...]:
        for place, value in zip(self.carried, carried, strict=True):
            place.detach().copy_(value.detach())
        with torch.set_grad_enabled(self.reached):
            self._now = self._call()
        for place, value in zip(self.left.differentiable, self._now.differentiable, strict=True):
            place.copy_(value.detach())
        return tuple(tensor.clone() for tensor in self.left.differentiable)

    def replay_backward(self, grads: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        assert self.reached, "a backward that was not recorded"
        self.backwards += 1
        for leaf in self._leaves:
            leaf.grad = None
        left = [(x, grad) for x, grad in zip(self._now.differentiable, grads, strict=True) if x.requires_grad]
        assert [x.requires_grad for x in self._now.differentiable] == list(self.wants)
        wanted = [(x, torch.zeros_like(x) if grad is None else grad) for x, grad in left]
        torch.autograd.backward(*zip(*wanted, strict=True))
        return tuple(leaf.grad for leaf in self._leaves)


def gradients(model: torch.nn.Module, out: object) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    (out.ce_sum / 64 + out.aux_loss).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", FROZEN, ids=str)
@pytest.mark.parametrize("name", ["dense", "experts", "lightning only"])
def test_recorded_segments_differentiate_what_is_trained(
    monkeypatch: pytest.MonkeyPatch, name: str, frozen: tuple[str, ...]
) -> None:
    monkeypatch.setattr(recorded_model, "Recorder", CallRecorder)
    monkeypatch.setattr(recorded_model, "RecordedSegment", CalledSegment)
    model = build_model(replace(MODELS[name], num_layers=5))
    freeze(model, frozen)
    if not any(p.requires_grad for p in model.parameters()):
        pytest.skip("this kind of layer has no such part")
    first, given = micro_batch([64]), micro_batch([30, 1, 33])
    recorded = RecordedModel(model)
    recording = recorded._graphs_of(first)
    for batch in (first, given):
        expected = gradients(model, model(*batch))
        assert expected.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
        found = gradients(model, replayed(model, recorded, recording, batch))
        assert found.keys() == expected.keys()
        for parameter, gradient in expected.items():
            torch.testing.assert_close(found[parameter], gradient, rtol=1e-5, atol=1e-7, msg=parameter)
    assert [one.backwards == 2 for one in recording.segments] == [one.reached for one in recording.segments]


def replayed(model: torch.nn.Module, recorded: RecordedModel, recording: object, batch: ModelInputs) -> object:
    """As `RecordedModel` runs a micro-batch of a number of tokens that it has graphs of."""
    inputs, segments = recording
    _load(inputs, SegmentInputs.of(batch, model))
    return run_segments(model, recorded._segments, segments, batch, inputs, recorded._watch)


def test_segments_below_all_that_is_trained_have_no_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_model, "Recorder", CallRecorder)
    monkeypatch.setattr(recorded_model, "RecordedSegment", CalledSegment)
    for frozen, reached in (
        ((), [True, True, True]),
        (("embed_tokens",), [True, True, True]),
        (("embed_tokens", "layers.[01]"), [False, True, True]),  # the second layer ends in the second segment
        (("*", "!lm_head"), [False, False, True]),
        (("layers", "norm"), [True, True, True]),
    ):
        model = build_model(DENSE)
        freeze(model, frozen)
        recording = RecordedModel(model)._graphs_of(micro_batch([64]))
        assert [one.reached for one in recording.segments] == reached, frozen


@pytest.mark.parametrize(
    ("frozen", "done"),
    [((), [5, 3, 1]), (("embed_tokens", "layers.[01]"), [5]), (("*", "!norm"), [])],
    ids=str,
)
def test_units_are_told_of_recorded_segments(
    monkeypatch: pytest.MonkeyPatch, frozen: tuple[str, ...], done: list[int]
) -> None:
    """Of five layers, the second and the fourth softmax: units 2 and 4."""
    monkeypatch.setattr(recorded_model, "Recorder", CallRecorder)
    monkeypatch.setattr(recorded_model, "RecordedSegment", CalledSegment)
    model, told = build_model(replace(DENSE, num_layers=5, layer_pattern="LS")), []
    freeze(model, frozen)
    watch = UnitWatch(model, lambda unit: told.append(("needed", unit)), lambda unit: told.append(("done", unit)))
    batch = micro_batch([64])
    recorded = RecordedModel(model, watch=watch)
    recording = recorded._graphs_of(batch)
    for tells in (False, True):
        told.clear()
        watch.begin(tells_done=tells)
        gradients(model, replayed(model, recorded, recording, batch))
        assert told[:3] == [("needed", 2), ("needed", 4), ("needed", 6)]
        assert told[3:] == ([("done", unit) for unit in done] if tells else [])
