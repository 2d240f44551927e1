"""What a run holds for as long as its layout stays the same: groups of processes, the model over them, its optimizer
and its reader of rows. At a boundary between layouts one is closed and the next opened in the same processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mmtrain.build import meta_model
from mmtrain.checkpoint.init_parts import EYES, EYES_OPTION
from mmtrain.checkpoint.load import load_checkpoint
from mmtrain.config import PretrainConfig
from mmtrain.errors import ConfigError
from mmtrain.hf.eyes_folder import load_eyes, open_eyes
from mmtrain.hf.folder import check_folder, is_hf_folder
from mmtrain.hf.read_weights import load_folder
from mmtrain.model.frozen import freeze
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel import mesh
from mmtrain.parallel.mesh import ParallelContext
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.batches import BatchReader
from mmtrain.train.curriculum import RunPlan
from mmtrain.train.device import compute_dtype, give_back_memory
from mmtrain.train.garbage import collect_all
from mmtrain.train.inputs import RunInputs
from mmtrain.train.phase_layouts import PhaseLayout
from mmtrain.train.warmup import AttentionPlans


class Session:
    """One layout at work; opening and closing it are collective.

    Attributes:
        laid: the layout, and the options that it follows from.
        context: the processes in it.
        dtype: of the products.
        model: the model over the processes.
        optimizer: of the model.
        batches: this rank's rows.
    """

    def __init__(
        self,
        config: PretrainConfig,
        context: ParallelContext,
        plan: RunPlan,
        phase_index: int,
        inputs: RunInputs,
        log: Callable[[str], None] | None = None,
    ) -> None:
        """Lay the model out as a phase wants it.

        Args:
            config: every option of the run.
            context: the processes, in any layout; left for another if the phase wants another.
            plan: phases with their layouts.
            phase_index: the phase that is trained next.
            inputs: of the run.
            log: gets a line for each of the first images that could not be decoded, on this rank.
        """
        laid = plan.phases[phase_index].laid
        assert laid is not None
        self.laid: PhaseLayout = laid
        if context.layout != self.laid.layout:
            mesh.stop()
            context = context.world.lay_out(self.laid.layout)
        self.context, parallel = context, self.laid.parallel
        self.dtype = compute_dtype(config.optim.precision, context.device)
        phases = [one.phase for one in plan.phases if one.laid == self.laid]
        self._lengths = [phase.seq_len for phase in phases]
        longest = max(phases, key=lambda phase: phase.tokens)  # where most of the work is
        offload = config.optim.name == "cpu_offload"
        model = meta_model(config.model)
        freeze(model, laid.frozen)
        self.model = apply_parallel(model, context, parallel, self.dtype, offload, longest.seq_len, laid.stages)
        self.model.initialise(config.run.seed)
        self.optimizer = build_optimizer(self.model.module, config.optim)
        self.batches = BatchReader(
            inputs, context.dp_rank, context.dp_size, parallel.micro_batch_rows, config.data.num_workers, log
        )

    def load(self, checkpoint: Path, with_optimizer: bool, parts: Sequence[str] = ()) -> None:
        """Read weights, and moments if wanted, from a checkpoint of any layout, or weights of a Hugging Face folder.

        Args:
            checkpoint: or folder.
            with_optimizer: moments are wanted.
            parts: patterns of what is read of a checkpoint without moments; empty reads all.

        Raises:
            ConfigError: the checkpoint is damaged, or its weights are not finite.
        """
        if is_hf_folder(checkpoint):
            folder = check_folder("run.init_from", checkpoint, self.model.module.config)
            load_folder("run.init_from", folder, self.model.module)
        else:
            load_checkpoint(checkpoint, self.model.module, self.optimizer if with_optimizer else None, parts)
        self._check_finite(checkpoint)

    def load_eyes(self, source: Path) -> None:
        """Read the eyes of another checkpoint, of any layout, or of a Hugging Face folder (`run.init_eyes`).

        Raises:
            ConfigError: they are damaged, or not finite.
        """
        module = self.model.module
        if is_hf_folder(source):
            load_eyes(EYES_OPTION, open_eyes(EYES_OPTION, source, module.config), module)
        else:
            load_checkpoint(source, module, None, EYES, EYES_OPTION)
        self._check_finite(source)

    def _check_finite(self, checkpoint: Path) -> None:
        if not self.model.weights_are_finite():
            raise ConfigError("checkpoint", checkpoint, "holds weights that are infinite or not numbers",
                              "take an earlier one: run.resume=RUN/checkpoints/step-N")  # fmt: skip

    def prepare(self, plans: AttentionPlans) -> list[str]:
        """Choose what is to be measured on this machine, and build what steps would otherwise wait for.

        Args:
            plans: of this process, which outlive the layout.

        Returns a line on each choice.
        """
        parallel = self.laid.parallel
        rows, seq_len = parallel.micro_batch_rows, max(self._lengths)
        lines = self.model.tune(rows * self._lengths[0] // (parallel.tp * parallel.cp))
        recompute = parallel.activation_checkpoint == "block"
        planned = plans.build(self.model.module, self.context, self.dtype, seq_len, recompute, rows)
        return [*lines, *([planned] if planned else [])]

    def close(self) -> float:
        """Give back all that the layout holds but the process group, never where a rank may be lost.

        Returns the GiB of device memory that torch still holds.
        """
        self.batches.close()
        self.model.close()
        del self.model, self.optimizer
        collect_all()  # modules under FSDP refer to each other
        return give_back_memory(self.context.device)
