"""Options of the layout: what the command line may give, and what is refused whatever the number of processes."""

from dataclasses import replace
from pathlib import Path

import pytest

from mmtrain.config import ParallelConfig
from mmtrain.config.cli import compose
from mmtrain.errors import ConfigError
from mmtrain.parallel.layout import plan_layout

CONFIGS = Path(__file__).parents[2] / "configs"


def parallel(*overrides):
    return compose(["run.name=a", "data.path=b", *overrides], CONFIGS).parallel


def test_the_file_holds_the_defaults():
    assert parallel() == ParallelConfig()


def test_options_come_from_the_command_line():
    config = parallel("parallel.tp=2", "parallel.pp=4", "parallel.pp_schedule=interleaved", "parallel.pp_chunks=2",
                      "parallel.aux_loss_over=sequence", "parallel.token_groups=4")  # fmt: skip
    assert config == ParallelConfig(tp=2, pp=4, pp_schedule="interleaved", pp_chunks=2, aux_loss_over="sequence",
                                    token_groups=4)  # fmt: skip


@pytest.mark.parametrize("chunks", [1, 2])
def test_zero_bubble_runs_with_any_number_of_chunks(chunks):
    ParallelConfig(pp_schedule="zero_bubble", pp_chunks=chunks).validate()


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("tp", "0"),
        ("pp", "-1"),
        ("cp", "0"),
        ("cp_chunks", "0"),
        ("cp_table", "striped"),
        ("cp_softmax", "ulysses"),
        ("ep", "0"),
        ("etp", "0"),
        ("tp", "1.5"),
        ("ffn_chunk_tokens", "0"),
        ("ffn_chunk_tokens", "all"),
        ("lightning_head_groups", "0"),
        ("offload_block_inputs", "-1"),
        ("offload_block_inputs", "2"),  # without recomputation
        ("pp_schedule", "gpipe"),
        ("pp_chunks", "0"),
        ("pp_chunks", "2"),
        ("token_groups", "0"),
        ("token_groups", "all"),
        ("token_groups", "2.5"),
        ("token_groups", "true"),
        ("exchange", "nccl"),
        ("exchange", "direct"),  # with one rank
        ("global_router", "maybe"),
        ("aux_loss_over", "batch"),
        ("aux_loss_over", "previous_batch"),
        ("global_router", "true"),
    ],
)
def test_bad_values_are_refused_by_name(option, text):
    with pytest.raises(ConfigError) as caught:
        parallel(f"parallel.{option}={text}")
    assert caught.value.option == f"parallel.{option}" and caught.value.fix


def test_the_global_router_is_a_switch():
    assert parallel("parallel.global_router=true", "parallel.ep=2").global_router is True


@pytest.mark.parametrize("over", ["micro_batch", "sequence", "global_batch"])
def test_the_auxiliary_loss_has_three_choices(over):
    assert parallel(f"parallel.aux_loss_over={over}").aux_loss_over == over


@pytest.mark.parametrize(
    ("others", "problem"),
    [
        (["token_groups=2"], "token_groups=2"),
        (["token_groups=auto"], "token_groups=auto"),
        (["etp=2"], "etp=2"),
        (["etp=2", "tp=4"], "tp=4"),
        (["global_router=true"], "pooled"),
    ],
)
def test_rows_are_read_directly_where_they_have_places_that_others_know(others, problem):
    assert parallel("parallel.exchange=direct", "parallel.ep=4").exchange == "direct"
    with pytest.raises(ConfigError, match=f"parallel.exchange=direct: .*{problem}"):
        parallel("parallel.exchange=direct", "parallel.ep=4", *(f"parallel.{other}" for other in others))


def test_interleaving_needs_chunks():
    with pytest.raises(ConfigError, match=r"parallel\.pp_chunks=1: .*interleaved.*parallel\.pp_chunks=2"):
        parallel("parallel.pp_schedule=interleaved")


def test_chunks_of_the_feed_forward_are_not_computed_once_a_weight():
    assert parallel("parallel.ffn_chunk_tokens=100").ffn_chunk_tokens == 100
    with pytest.raises(ConfigError, match=r"parallel\.ffn_chunk_tokens=100: .*zero_bubble"):
        parallel("parallel.ffn_chunk_tokens=100", "parallel.pp=2", "parallel.pp_schedule=zero_bubble")
    assert parallel("parallel.ffn_chunk_tokens=100", "parallel.pp_schedule=zero_bubble").pp == 1


def test_groups_of_heads_are_not_computed_once_a_weight():
    with pytest.raises(ConfigError, match=r"parallel\.lightning_head_groups=2: .*zero_bubble"):
        parallel("parallel.lightning_head_groups=2", "parallel.pp=2", "parallel.pp_schedule=zero_bubble")


@pytest.mark.parametrize(("groups", "tp"), [(3, 1), (4, 4), (16, 2)])
def test_groups_divide_the_heads_of_a_rank(groups, tp):
    config = compose(["run.name=r", "data.path=d", "model=proxy_100m"], CONFIGS)
    assert config.model.num_heads == 8
    with pytest.raises(
        ConfigError, match=rf"lightning_head_groups={groups}: does not divide the {8 // tp} heads"
    ) as said:
        plan_layout(tp, replace(config.parallel, tp=tp, lightning_head_groups=groups), config.model, [8192])
    assert said.value.fix.startswith("give one of 1, 2")
    softmax = replace(config.model, layer_pattern="S")
    assert plan_layout(1, replace(config.parallel, lightning_head_groups=groups), softmax, [8192]).tp == 1


@pytest.mark.parametrize(("given", "offloaded"), [("false", 0), ("true", 4), ("0", 0), ("3", 3), ("9", 4)])
def test_block_inputs_of_so_many_first_blocks_go_to_host_memory(given, offloaded):
    options = parallel("parallel.activation_checkpoint=block", f"parallel.offload_block_inputs={given}")
    assert [options.offloads(number) for number in range(4)] == [number < offloaded for number in range(4)]
