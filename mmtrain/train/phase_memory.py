"""Memory of a run's phases: predicted before anything starts, refused where it cannot fit, told when it runs out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mmtrain.config import PretrainConfig
from mmtrain.errors import ConfigError, OutOfDeviceMemory, brief
from mmtrain.parallel.memory.options import cannot_fit, may_not_fit, savings, what_fits
from mmtrain.parallel.memory.predict import GIB, PARTS, MemoryPrediction, margin_bytes, predict
from mmtrain.parallel.memory.workload import Workload
from mmtrain.train.curriculum import PhasePlan, RunPlan
from mmtrain.train.host_memory import PhaseHostMemory
from mmtrain.train.phase_frozen import frozen_parts

SHOWN_SAVINGS = 4


@dataclass
class PhaseMemory:
    """What each phase of a run needs of a device, and what there is.

    Attributes:
        names: of the phases.
        works: the phases as memory sees them.
        predictions: their peaks.
        device_bytes: memory of a device; None where it is not known, as on a CPU.
        host: what each phase needs of a host, and what there is.
        at_work: index of the phase that is trained; see :meth:`enter`.
    """

    names: Sequence[str]
    works: Sequence[Workload]
    predictions: Sequence[MemoryPrediction]
    device_bytes: float | None
    host: PhaseHostMemory
    at_work: int = 0

    @staticmethod
    def of(config: PretrainConfig, plan: RunPlan, device: torch.device) -> PhaseMemory:
        """Predict all phases of a plan that has layouts, and leave each prediction in its phase's plan.

        Args:
            config: every option.
            plan: phases with their layouts.
            device: of this process; `cluster.device_memory_gib` plans for one that is not here.
        """
        works = [phase_workload(config, phase, device) for phase in plan.phases]
        for phase, work in zip(plan.phases, works, strict=True):
            phase.memory = predict(work)
        predictions = [phase.memory for phase in plan.phases if phase.memory is not None]
        names = [phase.phase.name for phase in plan.phases]
        host = PhaseHostMemory.of(config, names, works, device)
        return PhaseMemory(names, works, predictions, device_memory(config, device), host)

    def enter(self, phase_index: int) -> None:
        """Take note of the phase at work; a device's peak is measured anew in each."""
        if phase_index != self.at_work and torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        self.at_work = phase_index

    def check(self) -> None:
        """Refuse phases that cannot fit the device, all at once, or the host.

        Raises:
            ConfigError: the first of them, with the options that would make it fit, and the needs of the others.
        """
        self.host.check()
        if self.device_bytes is None:
            return
        large = [i for i, found in enumerate(self.predictions) if cannot_fit(found, self.device_bytes)]
        if not large:
            return
        i, *others = large
        found, fits = self.predictions[i], what_fits(self.works[i], self.device_bytes)
        more = "".join(f"; {self.names[j]} needs {self.predictions[j].gib:.1f}" for j in others)
        fix = "no options are enough on so many processes: take more of them, a smaller model or shorter rows"
        if fits is not None:
            fix = f"give {fits.options} ({fits.prediction.gib:.1f} GiB)"
        raise ConfigError(f"stage.phases[{i}]", self.names[i],
                          f"needs {found.gib:.1f} GiB of device memory at {found.moment} ({_largest(found)}), "
                          f"and there are {self.device_bytes / GIB:.1f}{more}", fix)  # fmt: skip

    def lines(self) -> list[str]:
        """Return a line a phase for the header, and one where a phase needs memory of the host."""
        return [f"memory  {name}: {self._line(i)}" for i, name in enumerate(self.names)] + self.host.lines()

    def table(self) -> list[str]:
        """Return the parts of all phases in GiB, one a line, their sums, and what a device has."""
        width = max(14, *(len(name) + 2 for name in self.names))
        rows = [(part, [found.parts[part] / GIB for found in self.predictions]) for part in PARTS]
        rows = [(part, values) for part, values in rows if part != "images" or any(values)]  # a model of text has none
        rows.append(("predicted peak", [found.gib for found in self.predictions]))
        rows.append(("margin", [self._margin(i) / GIB for i in range(len(self.names))]))
        if self.device_bytes is not None:
            rows.append(("device", [self.device_bytes / GIB] * len(self.names)))
        head = f"{'GiB':16}" + "".join(f"{name:>{width}}" for name in self.names)
        lines = [f"{title:16}" + "".join(f"{value:{width}.2f}" for value in values) for title, values in rows]
        return [head, *lines, *(f"{name}: peak at {found.moment}"
                                for name, found in zip(self.names, self.predictions, strict=True))]  # fmt: skip

    @contextmanager
    def told(self) -> Iterator[None]:
        """Turn a device's lack of memory into the table and the options that save most.

        Raises:
            OutOfDeviceMemory: in place of torch's error.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise OutOfDeviceMemory(self._what_ran_out(error), [*self.table(), *self._advice()]) from error

    def _what_ran_out(self, error: torch.OutOfMemoryError) -> str:
        measured = ""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            most, reserved = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
            measured = f" at {most:.1f} GiB in tensors, {reserved:.1f} reserved"
        name, found = self.names[self.at_work], self.predictions[self.at_work]
        return f"out of device memory in phase {name}{measured}; predicted were {found.gib:.1f} ({brief(error)})"

    def _advice(self) -> list[str]:
        found = savings(self.works[self.at_work])[:SHOWN_SAVINGS]
        now = self.predictions[self.at_work].gib
        lines = [f"  {one.options}: {now - one.prediction.gib:.1f} GiB less" for one in found]
        return ["what would save most:", *lines] if lines else ["no option would save memory: take more processes"]

    def _line(self, i: int) -> str:
        found = self.predictions[i]
        if self.device_bytes is None:
            return f"{found.gib:.2f} GiB predicted of a device ({_largest(found)})"
        text = f"{found.gib:.1f} GiB predicted, margin {self._margin(i) / GIB:.1f}, of {self.device_bytes / GIB:.1f}"
        text += f" ({_largest(found)})"
        if may_not_fit(found, self.device_bytes, self.works[i].layout.world):
            fits = what_fits(self.works[i], self.device_bytes)
            text += "; may run out" + (f": {fits.options} would not ({fits.prediction.gib:.1f})" if fits else "")
        return text

    def _margin(self, i: int) -> float:
        return margin_bytes(self.predictions[i].peak, self.works[i].layout.world)


def _largest(found: MemoryPrediction) -> str:
    parts = sorted(found.parts.items(), key=lambda part: -part[1])[:4]
    return ", ".join(f"{name} {value / GIB:.{1 if found.peak > GIB else 3}f}" for name, value in parts)


def device_memory(config: PretrainConfig, device: torch.device) -> float | None:
    """Return the bytes of a device that predictions are held against; None where they are not known, as on a CPU."""
    if config.cluster.device_memory_gib is not None:
        return config.cluster.device_memory_gib * GIB
    return float(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def phase_workload(config: PretrainConfig, plan: PhasePlan, device: torch.device) -> Workload:
    """Return a phase that is laid out, as memory sees it."""
    assert plan.laid is not None
    parallel, layout = plan.laid.parallel, plan.laid.layout
    most = max(plan.used_rows()) // (layout.dp * parallel.micro_batch_rows)
    return Workload(
        config.model,
        parallel,
        layout,
        plan.phase.seq_len,
        most,
        _compute_bytes(config, device),
        host_optimizer=config.optim.name == "cpu_offload",
        stages=plan.laid.stages,
        frozen=frozen_parts(config.optim, plan.phase),
    )


def _compute_bytes(config: PretrainConfig, device: torch.device) -> int:
    """Bytes of an element of products. A device is not asked, so that planning touches none."""
    if config.optim.precision != "auto":
        return {"bf16": 2, "fp32": 4}[config.optim.precision]
    return 2 if device.type == "cuda" or config.cluster.device_memory_gib is not None else 4
