"""Marks on options: every option of a run, and whether a resume may change it and whether weights depend on it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from mmtrain.config import ModelConfig, PretrainConfig, VisionConfig
from mmtrain.config.option_marks import FREE_ON_RESUME, LAYOUT, SHAPES_WEIGHTS, is_marked, marked_fields
from mmtrain.config.option_tree import option_paths

FREE = {
    "checkpoint.interval", "checkpoint.keep", "checkpoint.keep_every", "checkpoint.keep_phase_ends",
    "checkpoint.keep_best", "checkpoint.save_final", "checkpoint.asynchronous", "checkpoint.verify",
    "cluster.account", "cluster.cpus_per_task", "cluster.device", "cluster.device_memory_gib", "cluster.environment",
    "cluster.host_memory_gib",
    "cluster.gpus_per_node", "cluster.log_folder", "cluster.nodes", "cluster.partition", "cluster.preflight",
    "cluster.processes_per_node", "cluster.qos", "cluster.sbatch", "cluster.scheduler", "cluster.setup",
    "cluster.shared_roots", "cluster.signal_seconds", "cluster.spare_nodes", "cluster.srun", "cluster.time_limit",
    "cluster.timeout_minutes",
    "data.allow_changed", "data.cache_dir", "data.max_epochs", "data.num_workers", "data.path", "data.strict_epochs",
    "data.tokenizer",
    "evals.max_share", "evals.needles.depths", "evals.needles.enabled", "evals.needles.every", "evals.needles.kinds",
    "evals.needles.lengths", "evals.needles.samples",
    "guard.copies_interval", "guard.pace_interval", "guard.max_in_row", "guard.max_rollbacks", "guard.rollback_steps",
    "guard.spike_deviations", "guard.spike_window",
    "log.gradient_fingerprints", "log.line_interval", "log.plot", "log.tensorboard", "log.valid_interval", "log.wandb",
    "log.wandb_project", "optim.max_skipped", "parallel.activation_checkpoint", "parallel.cuda_graphs",
    "parallel.offload_block_inputs", "parallel.reshard_after_forward",
    "run.change_schedule", "run.dir", "run.init_eyes", "run.init_from", "run.init_optimizer", "run.init_parts",
    "run.max_steps",
    "run.name", "run.plan", "run.plan_processes", "run.resume", "stage.preference.patience",
}  # fmt: skip
BOUND = {
    "data.long_sources", "data.packing", "data.seed", "data.sources", "data.valid_fraction",
    "data.valid_rows", "model.aux_loss_coef", "model.capacity_factor", "model.deepnorm_alpha", "model.deepnorm_beta",
    "model.drop_policy", "model.ffn_hidden_size", "model.head_dim", "model.hidden_size", "model.layer_pattern",
    "model.lightning_norm_eps", "model.loss_chunk_tokens", "model.name", "model.norm_eps", "model.num_experts",
    "model.num_heads", "model.num_kv_heads", "model.num_layers", "model.post_norm", "model.rope_base",
    "model.rotary_dim", "model.shared_ffn_hidden_size", "model.top_k", "model.vision.activation",
    "model.vision.contrastive.size", "model.vision.contrastive.temperature", "model.vision.contrastive.weight",
    "model.vision.ffn_hidden_size", "model.vision.grids", "model.vision.hidden_size", "model.vision.image_token",
    "model.vision.keep_class_token", "model.vision.norm_eps", "model.vision.num_heads", "model.vision.num_layers",
    "model.vision.patch_size", "model.vision.projector_activation", "model.vision.tile_size",
    "model.vision.unused_layers", "model.vocab_size", "optim.beta1",
    "optim.beta2", "optim.clip_grad", "optim.decay_norms", "optim.eps", "optim.frozen", "optim.name", "optim.precision",
    "optim.weight_decay", "parallel.aux_loss_over", "parallel.global_router", "parallel.micro_batch_rows", "run.seed",
    "stage.batch_scale", "stage.name", "stage.phases", "stage.preference.beta", "stage.scale", "stage.token_scale",
}  # fmt: skip
LAID_OUT = {
    f"parallel.{name}"
    for name in ("balance_images", "cp", "cp_chunks", "cp_softmax", "cp_states", "cp_table", "ep", "etp", "exchange",
                 "ffn_chunk_tokens", "fit", "lightning_head_groups", "pp", "pp_chunks", "pp_schedule",
                 "sync_every_micro_batch", "token_groups", "tp")
}  # fmt: skip


def test_each_option_is_free_on_resume_or_of_the_layout_or_bound() -> None:
    """A new option is bound until it is marked; it is named here either way, so that somebody has thought of it."""
    options = set(option_paths(PretrainConfig))
    assert options == FREE | BOUND | LAID_OUT
    assert {option for option in options if is_marked(PretrainConfig, option, LAYOUT)} == LAID_OUT
    assert is_marked(PretrainConfig, "stage.phases[1].parallel.tp", LAYOUT)
    assert {option for option in options if is_marked(PretrainConfig, option, FREE_ON_RESUME)} == FREE


def test_paths_of_corpora_are_free_wherever_they_stand() -> None:
    for sources in ("data.sources[1]", "stage.phases[2].sources[0]", "data.long_sources[0]"):
        assert is_marked(PretrainConfig, f"{sources}.path", FREE_ON_RESUME)
        assert not is_marked(PretrainConfig, f"{sources}.weight", FREE_ON_RESUME)
    assert not is_marked(PretrainConfig, "stage.phases[2].seq_len", FREE_ON_RESUME)


def test_weights_depend_on_these_options_of_the_model() -> None:
    assert {option.name for option in marked_fields(ModelConfig, SHAPES_WEIGHTS)} == {
        "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_hidden_size",
        "layer_pattern", "num_experts", "shared_ffn_hidden_size",
    }  # fmt: skip
    assert {option.name for option in marked_fields(VisionConfig, SHAPES_WEIGHTS)} == {
        "tile_size", "patch_size", "hidden_size", "num_layers", "ffn_hidden_size",
    }  # fmt: skip


@dataclass
class Inner:
    free: int = field(default=1, metadata=FREE_ON_RESUME)
    bound: int = 1


@dataclass
class Outer:
    marked: Inner = field(default_factory=Inner, metadata=FREE_ON_RESUME)
    plain: Inner = field(default_factory=Inner)
    values: list[int] = field(default_factory=list)
    groups: list[Inner] | None = None


@pytest.mark.parametrize(
    ("option", "free"),
    [("marked", True), ("marked.bound", True), ("marked.gone_since", True), ("plain", False), ("plain.free", True),
     ("plain.bound", False), ("plain.gone_since", False), ("values", False), ("values.0", False), ("gone", False),
     ("values[0]", False), ("groups[1].free", True), ("groups[1].bound", False), ("groups[1]", False)],
)  # fmt: skip
def test_a_group_s_mark_holds_for_all_in_it(option: str, free: bool) -> None:
    assert is_marked(Outer, option, FREE_ON_RESUME) is free
    assert not is_marked(Outer, option, SHAPES_WEIGHTS)
