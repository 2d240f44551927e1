"""The configurations of the repository, the typed schema, and what it refuses."""

import dataclasses
import typing
from pathlib import Path

import pytest

from mmtrain.config import PretrainConfig, load_config
from mmtrain.config.cli import compose
from mmtrain.config.schema import Count, build, parse_count
from mmtrain.errors import ConfigError
from mmtrain.train.curriculum import RunPlan, scaled_phases

CONFIGS = Path(__file__).parents[2] / "configs"
GIVEN = ["run.name=a", "data.path=b"]
MODELS = ["drawn_vl", "hybrid_1b", "hybrid_3b", "hybrid_410m", "hybrid_7b", "minimax_text_01", "minimax_vl_01",
          "moe_28b", "proxy_100m", "tiny", "tiny_vit", "tiny_vl", "vit_l_224", "vit_l_336", "vl_3b"]  # fmt: skip


def choices(group):
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


STAGES = ["curriculum", "long_ctx", "long_ctx_128k", "long_ctx_1m", "long_ctx_512k", "pretrain", "quickstart",
          "vit", "vit_336", "vit_drawn", "vl", "vl_align", "vl_dpo", "vl_dpo_drawn", "vl_drawn", "vl_experience",
          "vl_train"]  # fmt: skip


def test_the_groups_hold_what_the_readme_names():
    assert choices("model") == MODELS
    assert choices("stage") == STAGES
    assert choices("optim") == ["adamw", "apex", "cpu_offload"]


@pytest.mark.parametrize("model", MODELS)
def test_every_model_loads_under_its_own_name(model):
    config = compose([*GIVEN, f"model={model}"], CONFIGS).model
    assert config.name == model
    assert config.layer_types[7::8] == "S" * (config.num_layers // 8)
    assert config.rotary_dim * 2 == config.head_dim


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_loads_and_plans(stage):
    config = compose([*GIVEN, f"stage={stage}"], CONFIGS)
    plan = RunPlan(scaled_phases(config.stage), dp_size=2, micro_batch_rows=1)
    assert config.stage.name == stage and plan.left()[0] >= 100
    for phase in config.stage.phases:
        assert all(step.tokens % phase.seq_len == 0 for step in phase.batch)
        assert sum(segment.tokens for segment in phase.lr) == phase.tokens


@pytest.mark.parametrize("optim", ["adamw", "apex", "cpu_offload"])
def test_every_optimizer_loads(optim):
    assert compose([*GIVEN, f"optim={optim}"], CONFIGS).optim.name == optim


def test_paper_stages():
    phase = compose([*GIVEN, "stage=pretrain"], CONFIGS).stage.phases[0]
    assert (phase.seq_len, phase.rope_base, phase.tokens) == (8192, 10_000.0, 11_400_000_000_000)
    assert [(step.at, step.tokens) for step in phase.batch] == [
        (0, 16 * 2**20), (69 * 10**9, 32 * 2**20), (790 * 10**9, 64 * 2**20), (4_700 * 10**9, 128 * 2**20),
    ]  # fmt: skip
    phases = compose([*GIVEN, "stage=long_ctx"], CONFIGS).stage.phases
    assert [(phase.seq_len, phase.rope_base, phase.tokens) for phase in phases] == [
        (131_072, 5e6, 300 * 10**9), (524_288, 1e7, 32 * 10**9), (1_048_576, 1e7, 26 * 10**9),
    ]  # fmt: skip


def test_every_option_can_be_overridden():
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for stage in choices("stage"):
            composed = hydra_compose("pretrain", [f"+stage={stage}"])
            for group in dataclasses.fields(PretrainConfig):
                kind = typing.get_type_hints(PretrainConfig)[group.name]
                assert set(composed[group.name]) == {field.name for field in dataclasses.fields(kind)}, group.name


@pytest.mark.parametrize(
    ("text", "value"),
    [(8192, 8192), ("8Ki", 8192), ("16M", 16_000_000), ("7.2T", 7_200_000_000_000), ("11.4T", 11_400_000_000_000),
     ("2e6", 2_000_000), (2e6, 2_000_000), (".5Ki", 512), ("0", 0)],
)  # fmt: skip
def test_counts(text, value):
    assert parse_count(text, "x") == value


@pytest.mark.parametrize(
    "text", ["", "many", "1.2.3", ".", "-5", -5, 0.5, "1.5", "5Q", True, None, float("inf"), float("nan")]
)
def test_counts_that_are_none(text):
    with pytest.raises(ConfigError, match="x="):
        parse_count(text, "x")


def values(**changes):
    """Return the smallest whole configuration, with dotted changes."""
    phase = {"name": "p", "seq_len": 8, "rope_base": 1e4, "tokens": 64, "batch": [{"at": 0, "tokens": 8}],
             "lr": [{"kind": "constant", "tokens": 64, "end": 1e-3}]}  # fmt: skip
    whole = {
        "model": {"name": "m", "vocab_size": 10, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
                  "head_dim": 4, "ffn_hidden_size": 8, "rotary_dim": 2, "num_experts": 2},
        "stage": {"name": "s", "phases": [phase]},
        "data": {"path": "d"},
        "run": {"name": "r"},
    }  # fmt: skip
    for path, value in changes.items():
        *above, last = path.split("__")
        place = whole
        for part in above:
            place = place[int(part)] if part.isdigit() else place.setdefault(part, {})
        place[last] = value
    return whole


def test_smallest_configuration_loads():
    config = load_config(values())
    assert config.stage.phases[0].seq_len == 8 and isinstance(config.stage.phases[0].tokens, Count)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model.num_kv_heads", 3),
        ("model.rotary_dim", 6),
        ("model.rotary_dim", 3),
        ("model.top_k", 3),
        ("model.top_k", 0),
        ("model.num_experts", -1),
        ("model.capacity_factor", 0),
        ("model.layer_pattern", "LLs"),
        ("model.layer_pattern", ""),
        ("model.drop_policy", "prob"),
        ("model.vocab_size", 0),
        ("model.hidden_size", 2.5),
        ("model.hidden_size", True),
        ("model.hiden_size", 8),
        ("stage.phases", []),
        ("stage.scale", 0),
        ("stage.scale", float("nan")),
        ("stage.phases.0.seq_len", 0),
        ("stage.phases.0.tokens", "lots"),
        ("stage.phases.0.batch", []),
        ("stage.phases.0.batch", [{"at": 5, "tokens": 8}]),
        ("stage.phases.0.batch", [{"at": 0, "tokens": 0}]),
        ("stage.phases.0.batch", [{"at": 0, "tokens": 8}, {"at": 0, "tokens": 8}]),
        ("stage.phases.0.lr", []),
        ("stage.phases.0.lr", [{"kind": "cosin", "tokens": 8, "end": 1}]),
        ("stage.phases.0.lr", [{"kind": "exponential", "tokens": 8, "end": 1}]),
        ("stage.phases.0.sources", [{"path": "a", "weight": 0}]),
        ("data.path", None),
        ("data.packing", "bestfit"),
        ("data.sources", [{"path": "a"}]),
        ("data.valid_fraction", 1.0),
        ("optim.name", "adam"),
        ("optim.beta1", 1.0),
        ("optim.clip_grad", 0),
        ("optim.clip_grad", float("inf")),
        ("parallel.micro_batch_rows", 0),
        ("log.wandb", "of"),
        ("checkpoint.keep", -1),
        ("cluster.device", "gpu"),
        ("run.name", "a/b"),
        ("run.name", "???"),
        ("run.max_steps", 0),
    ],
)
def test_bad_input_is_refused_by_name_with_a_fix(option, value):
    with pytest.raises(ConfigError) as caught:
        load_config(values(**{option.replace(".", "__"): value}))
    named = caught.value.option.replace("[", ".").replace("]", "")
    assert named.startswith(option.rsplit(".", 1)[0]) and caught.value.fix
    assert "\n" not in str(caught.value)


def test_numbers_that_yaml_reads_as_text():
    config = load_config(values(optim__eps="1e-8", stage__scale="1/64"))
    assert (config.optim.eps, config.stage.scale) == (1e-8, 1 / 64)


def test_a_number_beyond_a_float_is_told_in_a_line():
    with pytest.raises(ConfigError, match=r"optim.eps=1000.*\.\.\.: is beyond a float"):
        load_config(values(optim__eps=10**400))


def test_an_option_of_two_types_takes_either_and_names_both_when_neither_fits():
    either = dataclasses.make_dataclass("Either", [("size", int | str)])
    assert build(either, {"size": 4}).size == 4 and build(either, {"size": "auto"}).size == "auto"
    for given, text in [([1], "expected int or str, got list"), (None, "expected int or str"), ("???", "required")]:
        with pytest.raises(ConfigError) as caught:
            build(either, {"size": given}, "some")
        assert caught.value.option == "some.size" and text in caught.value.problem


def test_an_optional_of_one_type_says_what_that_type_needs():
    with pytest.raises(ConfigError, match=r"model\.capacity_factor=some: expected float, got str"):
        load_config(values(model__capacity_factor="some"))
