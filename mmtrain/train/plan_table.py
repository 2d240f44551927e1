"""What `--plan` prints: every phase with its layout, schedule and memory, from arithmetic alone."""

from __future__ import annotations

from mmtrain.log.console import count_text
from mmtrain.model.flops import count_parameters
from mmtrain.train.curriculum import PhasePlan
from mmtrain.train.plan_run import PlannedRun


def plan_lines(planned: PlannedRun) -> list[str]:
    """Return the lines of the plan: the model, each phase, what was chosen, the table of memory, and what fits."""
    config, memory = planned.config, planned.memory
    world = memory.works[0].layout.world
    counted = count_parameters(config.model)
    head = (
        f"{config.model.name}: {count_text(counted.total)} parameters, on {world} "
        f"{'process' if world == 1 else 'processes'}; nothing is started"
    )
    phases = [line for phase in planned.plan.phases for line in _phase(phase)]
    return [head, "", *phases, *planned.choices, "", *memory.table(), "", *memory.lines()]


def _phase(plan: PhasePlan) -> list[str]:
    assert plan.laid is not None
    phase, parallel, (steps, tokens) = plan.phase, plan.laid.parallel, plan.left()
    rows = list(dict.fromkeys(plan.rows))
    batches = " -> ".join(f"{count_text(one * phase.seq_len)} ({one:,} rows)" for one in rows)
    first, last = plan.lr(0), plan.lr(max(0, phase.tokens - 1))
    offloaded, kept = parallel.offload_block_inputs, ""
    if offloaded:
        kept = f", inputs of {'all' if offloaded is True else f'the first {offloaded}'} blocks in host memory"
    if parallel.ffn_chunk_tokens is not None:
        kept += f", feed-forwards in chunks of {parallel.ffn_chunk_tokens:,} tokens"
    if parallel.lightning_head_groups > 1:
        kept += f", lightning layers in {parallel.lightning_head_groups} groups of heads"
    return [
        f"phase {phase.name}: rows of {phase.seq_len:,} tokens, RoPE base {phase.rope_base:g}, {count_text(tokens)} "
        f"tokens in {steps:,} steps of {batches}, learning rate {first:.2e} to {last:.2e}",
        f"  layout {plan.laid.layout}, micro-batches of {parallel.micro_batch_rows} "
        f"{'row' if parallel.micro_batch_rows == 1 else 'rows'}, recompute {parallel.activation_checkpoint}{kept}",
    ]
