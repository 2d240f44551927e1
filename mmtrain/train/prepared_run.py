"""Everything that a launch checks, reads and decides by itself, before it joins other processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from mmtrain.checkpoint.agreement import on_main
from mmtrain.checkpoint.run_folder import RunFolder, Start
from mmtrain.config import PretrainConfig
from mmtrain.config.checks import require
from mmtrain.config.process_env import read_processes
from mmtrain.evals.needles import NeedleEvaluation, needle_evaluation
from mmtrain.log.tensorboard_tracker import check_tensorboard
from mmtrain.log.wandb_tracker import wandb_mode
from mmtrain.optim.optimizer import check_optimizer
from mmtrain.parallel import mesh
from mmtrain.parallel.layout import Layout
from mmtrain.parallel.mesh import ParallelContext, World
from mmtrain.train.device import keep_freed_memory
from mmtrain.train.epochs import tokens_by_phase
from mmtrain.train.inputs import RunInputs
from mmtrain.train.plan_run import PlannedRun, plan_run
from mmtrain.train.preference_checks import check_preference, preference_lines, unused_pairs_lines
from mmtrain.train.reference_weights import Reference, find_reference
from mmtrain.train.resume import (
    check_corpora,
    decide_start,
    layout_lines,
    recorded_cp,
    start_position,
    verified_start,
    weights_record,
)
from mmtrain.train.stage_warnings import stage_warnings, trained_length


@dataclass(frozen=True)
class PreparedRun:
    """A launch that may join the other processes.

    Attributes:
        planned: the run as it will be trained.
        folder: of the run; nothing was written to it.
        start: what the run begins with, as every process sees it for itself.
        inputs: corpora and tokenizer, opened and checked.
        needles: evaluation at the run's lengths, if it is asked for.
        notes: lines for the header.
        first_phase: index of the phase that this process would begin in, the last one's if nothing is left to train.
    """

    planned: PlannedRun
    folder: RunFolder
    start: Start
    inputs: RunInputs
    needles: NeedleEvaluation | None
    notes: tuple[str, ...]
    first_phase: int

    def first_layout(self, world: World) -> Layout:
        """Return the layout of the phase that the main process begins in. Collective, before there is a group.

        Every process has looked at the folder for itself, and may have seen another newest checkpoint: NFS answers out
        of a cache, and another launch may still write there. Groups of two layouts would wait for each other for ever.
        """
        phase = int(world.of_main("first phase", str(self.first_phase)))
        return self.planned.layouts[phase].layout

    def join(self) -> ParallelContext:
        """Join the other processes, in the layout that the main process begins with. Collective.

        Raises:
            ConfigError: another process has other options.
        """
        cluster = self.planned.config.cluster
        if mesh.pick_device(cluster).type == "cpu":
            keep_freed_memory()
        world = mesh.join(cluster)
        self.planned.check_same_on_all(world)
        return world.lay_out(self.first_layout(world))

    def verified_start(self) -> Start:
        """Choose again what the run begins with, its bytes read, and add the lines for the header. Collective.

        Raises:
            ConfigError: it is damaged and there is no older one, or it was trained on other corpora.
        """
        config = self.planned.config
        start = verified_start(config, self.folder)
        notes = self.notes
        if (start.resume, start.weights) != (self.start.resume, self.start.weights):  # an older one, for damage
            notes += tuple(check_corpora(start, self.inputs.fingerprints(), config.data.allow_changed))
        return replace(start, notes=(*notes, *start.notes))

    def reference(self, start: Start) -> Reference | None:
        """Return the frozen reference of preference training, None where a run trains on next tokens. Collective.

        Args:
            start: what :meth:`verified_start` chose.

        Raises:
            ConfigError: what the run's folder holds is of another one.
        """
        config = self.planned.config
        if config.stage.preference is None:
            return None
        return on_main(lambda: find_reference(config, self.inputs, start, self.folder.path))


def plan_launch(config: PretrainConfig) -> PlannedRun:
    """Check the options that need no file, and plan the run.

    Raises:
        ConfigError: the first option that cannot work.
    """
    device, plan_only = mesh.pick_device(config.cluster), config.run.plan
    require(config.model.vision is None or config.parallel.cuda_graphs is not True, "parallel.cuda_graphs", True,
            "a model with eyes takes as many images as there are: it is not recorded",
            "give parallel.cuda_graphs=auto")  # fmt: skip
    if not plan_only:
        check_optimizer(config.optim, device.type)
        require(config.parallel.cuda_graphs is not True or device.type == "cuda", "parallel.cuda_graphs", True,
                 f"a {device.type} has none", "give parallel.cuda_graphs=auto")  # fmt: skip
    check_preference(config)
    check_tensorboard(config.log)
    if read_processes().rank == 0 and not plan_only:
        wandb_mode(config.log)  # refuses what cannot be
    world = config.run.plan_processes if plan_only and config.run.plan_processes else mesh.world_size()
    return plan_run(config, world, device, recorded_cp(config))


def prepare_run(planned: PlannedRun, note: Callable[[str], None]) -> PreparedRun:
    """Check memory, checkpoint and corpora, and open what the run reads.

    What cannot work is refused here, by every rank, before any waits for another.

    Args:
        planned: the run.
        note: is told, in a line, what takes its time.

    Raises:
        ConfigError: the first option that cannot work.
    """
    config, phases, plan = planned.config, planned.phases, planned.plan
    planned.memory.check()
    folder = RunFolder(config)
    start = decide_start(config, folder)
    inputs = RunInputs(config.data, phases, config.model.vocab_size, log=note)
    source = config.data.all_sources[0].path
    units = [laid.row_unit for laid in planned.layouts]
    needles = needle_evaluation(config, phases, units, inputs.held_out, inputs.tokenizer, source)
    phase_tokens = tokens_by_phase(plan, config.run.max_steps)
    inputs.check_epochs(phase_tokens)
    notes = [*planned.choices, *inputs.check_images(config.model), *inputs.header_lines(phase_tokens)]
    notes += needles.header_lines(phases) if needles else []
    notes += check_corpora(start, inputs.fingerprints(), config.data.allow_changed)
    record = weights_record(start)
    warned = stage_warnings(config, phases, trained_length(record), record.get("rope_base"))
    notes += (f"warning: {line}" for line in warned)
    first = plan.next(start_position(start))
    inputs.prepare(first)
    first_phase = len(planned.layouts) - 1 if first is None else first.phase_index
    if config.stage.preference is not None:
        notes += preference_lines(config, inputs)
        find_reference(config, inputs, start, folder.path)
    else:
        notes += unused_pairs_lines(inputs)
    notes += layout_lines(start, planned.layouts[first_phase].layout, config.parallel.global_router)
    return PreparedRun(planned, folder, start, inputs, needles, tuple(notes), first_phase)
