"""Layouts: the sizes that come out, what is refused and by which name, and that the advice given works."""

import dataclasses
import subprocess
import sys

import pytest

from mmtrain.config import ModelConfig, ParallelConfig, VisionConfig
from mmtrain.errors import ConfigError
from mmtrain.parallel.layout import Layout, plan_layout
from tests.parallel.advice import advised


def model(**changes):
    base = dict(name="m", vocab_size=160, hidden_size=64, num_layers=8, num_heads=8, num_kv_heads=2, head_dim=8,
                ffn_hidden_size=96, rotary_dim=4, num_experts=8)  # fmt: skip
    made = ModelConfig(**(base | changes))
    made.validate()
    return made


def refusal(world, parallel, shape, seq_lens=()):
    with pytest.raises(ConfigError) as caught:
        plan_layout(world, parallel, shape, seq_lens)
    assert "\n" not in str(caught.value)
    return caught.value


def test_every_axis_is_sized():
    layout = plan_layout(8, ParallelConfig(pp=2, tp=2, ep=2, etp=2), model(), [32])
    assert layout == Layout(pp=2, dp=2, cp=1, tp=2, edp=1, ep=2, etp=2)
    assert str(layout) == "PP2 x DP2 x CP1 x TP2 | PP2 x EDP1 x EP2 x ETP2"
    assert (layout.world, layout.replicas) == (8, 2)
    assert Layout(pp=1, dp=2, cp=3, tp=1, edp=6, ep=1, etp=1).replicas == 6


def test_defaults_are_data_parallel():
    assert plan_layout(1, ParallelConfig(), model()) == Layout(1, 1, 1, 1, 1, 1, 1)
    assert plan_layout(12, ParallelConfig(), model()) == Layout(pp=1, dp=12, cp=1, tp=1, edp=12, ep=1, etp=1)


def test_a_dense_model_has_one_expert_rank():
    layout = plan_layout(8, ParallelConfig(pp=2, tp=2), model(num_experts=0))
    assert (layout.edp, layout.ep, layout.etp) == (4, 1, 1)


REFUSED = [
    # processes, options, changes to the model, lengths; the option named, and what the message says
    (8, dict(tp=3), {}, [], "tp", "8 processes = pp 1 x dp ? x cp 1 x tp 3: 8 / 3 is not whole"),
    (8, dict(pp=3), {}, [], "pp", "8 processes = pp 3 x dp ? x cp 1 x tp 1: 8 / 3 is not whole"),
    (8, dict(pp=2, tp=8), {}, [], "tp", "8 processes = pp 2 x dp ? x cp 1 x tp 8: 8 / 16 is not whole"),
    (4, dict(tp=8), {}, [], "tp", "4 / 8 is not whole"),
    (8, dict(ep=3), {}, [], "ep", "8 processes = pp 1 x edp ? x ep 3 x etp 1: 8 / 3 is not whole"),
    (8, dict(ep=4, etp=4), {}, [], "etp", "8 processes = pp 1 x edp ? x ep 4 x etp 4: 8 / 16 is not whole"),
    (8, dict(pp=2, ep=8), {}, [], "ep", "8 processes = pp 2 x edp ? x ep 8 x etp 1: 8 / 16 is not whole"),
    (16, dict(tp=16), {}, [], "tp", "model.num_heads 8 / tp 16 is not whole"),
    (12, dict(tp=6), dict(num_heads=12, num_kv_heads=4), [], "tp", "model.num_kv_heads 4 and tp 6: neither divides"),
    (8, dict(tp=8), dict(vocab_size=7), [], "tp", "model.vocab_size 7 is less than tp 8"),
    (8, dict(tp=8), dict(num_experts=0, ffn_hidden_size=84), [], "tp", "model.ffn_hidden_size 84 / tp 8"),
    (8, dict(tp=8), dict(shared_ffn_hidden_size=84), [], "tp", "model.shared_ffn_hidden_size 84 / tp 8"),
    (8, dict(tp=4), {}, [8, 6], "tp", "micro_batch_rows 1 x seq_len 6 = 6 tokens / tp 4 is not whole"),
    (12, dict(ep=12), {}, [], "ep", "model.num_experts 8 / ep 12 is not whole"),
    (8, dict(ep=2), dict(num_experts=0), [], "ep", "model.num_experts=0: a dense model"),
    (8, dict(etp=2), dict(num_experts=0), [], "etp", "model.num_experts=0: a dense model"),
    (5, dict(etp=5), {}, [], "etp", "model.ffn_hidden_size 96 / etp 5 is not whole"),
    (8, dict(etp=8), {}, [], "etp", "model.ffn_hidden_size 96 / etp 8 = 12 is not a multiple of 8"),
    (16, dict(pp=16), {}, [], "pp", "pp 16 x pp_chunks 1 = 16 is more than model.num_layers 8"),
    (8, dict(pp=8, pp_chunks=2, pp_schedule="interleaved"), {}, [], "pp", "pp 8 x pp_chunks 2 = 16 is more than"),
]


@pytest.mark.parametrize(("world", "options", "changes", "seq_lens", "axis", "text"), REFUSED)
def test_refusals_name_the_option_show_the_arithmetic_and_advise_what_works(
    world, options, changes, seq_lens, axis, text
):
    parallel, shape = ParallelConfig(**options), model(**changes)
    error = refusal(world, parallel, shape, seq_lens)
    assert (error.option, error.value) == (f"parallel.{axis}", options[axis]) and text in error.problem
    assert 1 <= len(advised(error.fix)) <= 3
    for overrides in advised(error.fix):
        plan_layout(world, dataclasses.replace(parallel, **overrides), shape, seq_lens)


@pytest.mark.parametrize(
    ("options", "option", "text"),
    [
        (dict(tp=0), "tp", "at least 1"),
        (dict(pp=2, pp_schedule="interleaved"), "pp_chunks", "needs more than one chunk"),
        (dict(pp=2, pp_chunks=2), "pp_chunks", "runs one chunk"),
        (dict(pp_chunks=9, pp_schedule="zero_bubble"), "pp_chunks", "more chunks than model.num_layers=8"),
    ],
)
def test_options_that_no_number_of_processes_mends(options, option, text):
    error = refusal(8, ParallelConfig(**options), model())
    assert error.option == f"parallel.{option}" and text in error.problem


def test_rows_of_exact_size_cannot_be_read_directly():
    parallel = ParallelConfig(ep=2, exchange="direct")
    assert plan_layout(2, parallel, model()).ep == 2
    error = refusal(2, parallel, dataclasses.replace(model(), capacity_factor=None))
    assert error.option == "parallel.exchange" and "model.capacity_factor" in error.fix


@pytest.mark.parametrize(("heads", "kv_heads", "tp"), [(8, 2, 2), (8, 2, 8), (8, 1, 4), (12, 4, 12), (12, 6, 3)])
def test_key_value_heads_are_shared_out_or_replicated(heads, kv_heads, tp):
    assert plan_layout(tp, ParallelConfig(tp=tp), model(num_heads=heads, num_kv_heads=kv_heads)).tp == tp


def test_rows_of_a_micro_batch_count_for_sequence_parallelism():
    assert plan_layout(4, ParallelConfig(tp=4, micro_batch_rows=2), model(), [6, 32]).tp == 4


def test_advice_changes_only_what_is_wrong_and_nearest_first():
    assert advised(refusal(8, ParallelConfig(tp=3, ep=4), model()).fix) == [{"tp": 4}, {"tp": 2}, {"tp": 8}]
    assert advised(refusal(8, ParallelConfig(pp=2, tp=8), model()).fix) == [{"pp": 1}, {"tp": 4}, {"tp": 2}]
    assert advised(refusal(7, ParallelConfig(tp=2, ep=2), model()).fix) == [{"tp": 1, "ep": 1}]


def test_advice_is_found_among_many_processes():
    wide = model(num_heads=5040, num_kv_heads=5040, num_experts=5040, ffn_hidden_size=40_320, num_layers=4096,
                 vocab_size=6000)  # fmt: skip
    parallel = ParallelConfig(tp=11, ep=13, etp=17)
    for overrides in advised(refusal(15_120, parallel, wide).fix):
        plan_layout(15_120, dataclasses.replace(parallel, **overrides), wide)


def test_planning_needs_no_torch():
    code = "import sys, mmtrain.parallel.layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_with_eyes_is_not_recorded():
    seeing = model(vision=VisionConfig(image_token=5))
    error = refusal(1, ParallelConfig(cuda_graphs=True), seeing)
    assert (error.option, error.value) == ("parallel.cuda_graphs", True) and "eyes" in str(error)
    assert plan_layout(1, ParallelConfig(), seeing) == plan_layout(1, ParallelConfig(cuda_graphs=True), model())
