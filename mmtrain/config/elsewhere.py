"""Names that other programs give to options, and where the same thing lives here."""

from __future__ import annotations

_LR = "the learning rate is a schedule of the stage: stage.phases[0].lr[0].end=2e-4, one segment a stretch of tokens"
_LENGTH = "each phase has its row length: stage.phases[0].seq_len=4096 (stage.scale=1/2 shrinks all of a stage alike)"
_BATCH = (
    "the global batch is in tokens, by phase: stage.phases[0].batch[0].tokens=1Mi (stage.batch_scale=1/16 shrinks all)"
)
_MICRO = "parallel.micro_batch_rows=N: the rows that one process runs at once"
_ACCUMULATION = (
    "it follows: stage.phases[0].batch[0].tokens / (stage.phases[0].seq_len x parallel.micro_batch_rows x "
    "data-parallel processes)"
)
_TOKENS = "each phase has its tokens: stage.phases[0].tokens=1B (stage.token_scale=1/100 shortens all of a stage)"
_STEPS = "run.max_steps=N stops early; the length is in tokens: stage.phases[0].tokens=1B or stage.token_scale=1/100"
_EPOCHS = "the length is in tokens, not epochs: stage.phases[0].tokens=1B"
_DATA_PARALLEL = "data parallelism takes the processes that the other axes leave: torchrun --nproc-per-node N"
_WARMUP = "the warm-up is the first segment of the schedule: stage.phases[0].lr[0].tokens=20M"
_SHARDING = "parameters are sharded over data parallelism always; parallel.reshard_after_forward=false is ZeRO-2"

_LIVES = {
    _LR: "lr learning_rate max_lr min_lr peak_lr base_lr lr_scheduler lr_schedule lr_decay_style lr_scheduler_type",
    _WARMUP: "warmup warmup_steps warmup_tokens warmup_ratio lr_warmup_iters lr_warmup_steps num_warmup_steps",
    _LENGTH: "seq_len seq_length sequence_length max_seq_len max_seq_length context_length block_size max_length "
    "max_position_embeddings n_ctx",
    _BATCH: "batch batch_size global_batch_size gbs train_batch_size batch_tokens",
    _MICRO: "micro_batch_size microbatch_size mbs per_device_train_batch_size local_batch_size micro_batch",
    _ACCUMULATION: "gradient_accumulation gradient_accumulation_steps grad_accum grad_accum_steps "
    "accumulate_grad_batches accumulation_steps accumulation",
    _TOKENS: "tokens train_tokens max_tokens total_tokens num_tokens",
    _STEPS: "steps train_steps num_steps total_steps training_steps train_iters max_iters iterations num_iterations",
    _EPOCHS: "epochs num_train_epochs num_epochs",
    _DATA_PARALLEL: "dp dp_size data_parallel data_parallel_size dp_degree nproc nproc_per_node gpus num_gpus devices "
    "world_size num_nodes nnodes processes",
    _SHARDING: "fsdp zero zero_stage sharding_strategy ddp",
    "parallel.tp=N": "tensor_parallel tensor_parallel_size tensor_model_parallel_size tp_size tp_degree",
    "parallel.pp=N": "pipeline_parallel pipeline_parallel_size pipeline_model_parallel_size pp_size pp_degree",
    "parallel.ep=N": "expert_parallel expert_parallel_size expert_model_parallel_size ep_size ep_degree",
    "parallel.cp=N": "context_parallel context_parallel_size cp_size cp_degree",
    "it comes with parallel.tp": "sequence_parallel sp",
    "parallel.activation_checkpoint=block": "recompute gradient_checkpointing activation_checkpointing "
    "recompute_granularity",
    "optim.precision=bf16 or fp32": "dtype bf16 fp16 mixed_precision amp torch_dtype",
    "optim.clip_grad=1.0": "clip grad_clip max_grad_norm gradient_clip_val clip_norm grad_norm_clip",
    "optim.beta1=0.9 optim.beta2=0.95": "betas adam_beta1 adam_beta2 momentum",
    "optim.eps=1e-8": "adam_eps adam_epsilon epsilon",
    "optim=adamw, apex or cpu_offload": "optimizer",
    "checkpoint.interval=N": "save_interval save_steps save_every checkpoint_interval ckpt_interval",
    "checkpoint.keep=N": "save_total_limit keep_last keep_last_n",
    "log.valid_interval=N": "eval_interval val_interval eval_steps eval_every val_check_interval",
    "run.resume=auto goes on with this run; run.init_from=runs/OTHER takes another's weights": "load load_from "
    "resume_from resume_from_checkpoint checkpoint_path ckpt ckpt_path load_path init_checkpoint",
    "run.dir=FOLDER run.name=NAME": "output_dir save save_dir out_dir log_dir exp_name experiment run_name "
    "experiment_name",
    "data.path=DIR, a corpus made by launch/prepare.py": "dataset data_path train_data train_files dataset_path corpus",
    "stage.phases[0].rope_base=10000": "rope_theta rotary_base theta rotary_emb_base",
    "model.num_layers=N": "n_layer n_layers num_hidden_layers depth layers",
    "model.hidden_size=N": "d_model dim n_embd width hidden_dim",
    "model.num_heads=N": "n_head n_heads num_attention_heads",
    "model.num_kv_heads=N": "num_key_value_heads n_kv_heads num_query_groups",
    "model.ffn_hidden_size=N": "intermediate_size d_ff moe_intermediate_size",
    "model.num_experts=N": "num_local_experts n_experts n_routed_experts",
    "model.top_k=N": "num_experts_per_tok moe_top_k topk moe_router_topk",
    "model.aux_loss_coef=0.01": "router_aux_loss_coef moe_aux_loss_coeff load_balance_loss_weight",
    "there is none: pretraining here uses no dropout": "dropout hidden_dropout attention_dropout",
}


def elsewhere(name: str) -> str | None:
    """Return where the option of this name lives here, as it is written on the command line; None for other names."""
    last = name.split(".")[-1].lower().replace("-", "_")
    return next((place for place, names in _LIVES.items() if last in names.split()), None)
