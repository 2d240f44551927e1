"""Text options keep the text that was typed, wherever Hydra's grammar reads a number, a truth value or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmtrain.config import SourceConfig
from mmtrain.config.cli import compose
from mmtrain.config.overrides import read_override
from mmtrain.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
AS_TYPED = [
    "2026_11_28", "1234e56", "1e3", "007", "1_000", "0x10", "1.50", "+3", "nan", "INF", "null", "true", "False", "on",
    "off", "a b", "a=b", "it's", 'a"b', "x(v2)", "my run (v2)", "f(1_0)", "[a]", "{a: 1}", "a:b", "größe", "a#1", "~x",
    "C:\\new", "a\\'b", "-1", "50%", "a[1]", "1 2",
]  # fmt: skip
READ_BY_HYDRA = [
    ("'q'", "q"), ('"1_0"', "1_0"), ("'a,b'", "a,b"), ("a\\,b", "a,b"), ("'it\\'s'", "it's"), ("str(5)", "5"),
    ("${model.name}", "tiny"), ("${model.name}_1e3", "tiny_1e3"), ("w${model.hidden_size}", "w256"),
    ("${model.hidden_size}", "256"), ("${model.post_norm}", "true"), ("a(${model.name})", "a(tiny)"),
]  # fmt: skip


def name(value: str, *others: str) -> str:
    return compose([f"run.name={value}", "data.path=d", *others], CONFIGS).run.name


@pytest.mark.parametrize("text", AS_TYPED)
def test_text_is_what_was_typed(text: str) -> None:
    assert name(text) == text


@pytest.mark.parametrize(("typed", "text"), READ_BY_HYDRA)
def test_hydra_s_quotes_functions_and_interpolations_stay(typed: str, text: str) -> None:
    assert name(typed) == text


def test_every_text_option_is_kept_and_others_are_not() -> None:
    config = compose(["run.name=1_0", "data.path=20_26", "log.wandb_project=123", "stage.phases.0.name=1",
                      "data.tokenizer=007", "run.init_from=1e3", "model.name=1.0", "log.wandb=off", "run.seed=1_0",
                      "parallel.token_groups=4", "optim.eps=1e-3",
                      "stage.phases.0.tokens=1_000_000"], CONFIGS)  # fmt: skip
    assert (config.run.name, config.data.path, config.log.wandb_project) == ("1_0", "20_26", "123")
    assert (config.stage.phases[0].name, config.data.tokenizer, config.run.init_from) == ("1", "007", "1e3")
    assert (config.model.name, config.log.wandb, config.run.seed) == ("1.0", "off", 10)
    assert (config.parallel.token_groups, config.optim.eps, config.stage.phases[0].tokens) == (4, 1e-3, 1_000_000)


def test_null_is_null_where_text_may_be_missing_and_quoted_text_where_it_is_quoted() -> None:
    assert compose(["run.name=a", "data.path=d", "data.tokenizer=null"], CONFIGS).data.tokenizer is None
    assert compose(["run.name=a", "data.path=d", "data.tokenizer='null'"], CONFIGS).data.tokenizer == "null"


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.sources=[{path: 20_26, weight: 2},{path: b/1e5}]"],
        ["+data.sources=[{path: 20_26, weight: 2e0},{path: 'b/1e5'}]"],
        ["data.sources[0].path=20_26", "data.sources[0].weight=2", "+data.sources[1].path=b/1e5"],
        ["data.sources.1.path=b/1e5", "data.sources.0.path=20_26", "data.sources.0.weight=2"],
        ["data.sources=[{path: 20_26},{path: b/1e5}]", "data.sources[0].weight=2"],
    ],
)
def test_text_in_lists_and_positions_as_errors_spell_them(overrides: list[str]) -> None:
    sources = compose(["run.name=a", *overrides], CONFIGS).data.sources
    assert sources == [SourceConfig("20_26", 2.0), SourceConfig("b/1e5", 1.0)]
    long = ["data.path=d", *(one.replace("data.sources", "data.long_sources") for one in overrides)]
    assert compose(["run.name=a", *long], CONFIGS).data.long_sources == sources


def test_positions_of_phases() -> None:
    given = ["run.name=a", "data.path=d", "stage=long_ctx"]
    phases = compose([*given, "stage.phases[1].seq_len=4096", "++stage.phases[2].lr[0].end=1e-5"], CONFIGS).stage.phases
    assert (phases[0].seq_len, phases[1].seq_len, phases[2].lr[0].end) == (131072, 4096, 1e-5)
    phase = compose([*given, "stage.phases[0].sources[0].path=1_0"], CONFIGS).stage.phases[0]
    assert phase.sources == [SourceConfig("1_0")]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.phases[3].seq_len=1", "stage.phases has no position 3"),
        ("data.sources[1].path=a", r"data.sources\[0\]=\(missing\): positions \[1\] are given"),
        ("run.name=a,b", "several values; add -m to sweep over them, or quote the text: \"run.name='a,b'\""),
        ("run.name='a", "not readable"),
        ("~run.name", "options cannot be taken out"),
    ],
)
def test_what_cannot_be_read_says_so(override: str, message: str) -> None:
    given = [text for text in ("run.name=a", "data.path=d") if text.split("=")[0] not in override]
    given = given[:1] if "sources" in override else given
    with pytest.raises(ConfigError, match=message):
        compose([*given, override], CONFIGS)


def test_sweeps_quote_each_value() -> None:
    assert read_override("run.name=1_0,2_0").hydra == "run.name='1_0','2_0'"
    assert read_override("run.name=a,1e3,'x,y',[b]").hydra == "run.name=a,'1e3','x,y','[b]'"
    assert read_override("run.name=choice(1_0,b)").hydra == "run.name=choice('1_0',b)"
    assert read_override("run.name=range(1,4)").hydra == "run.name=range(1,4)"
    assert read_override("run.seed=1_0,2_0").hydra == "run.seed=1_0,2_0"


def test_numbers_in_yaml_files_are_refused_where_text_is_meant(tmp_path: Path) -> None:
    import shutil

    shutil.copytree(CONFIGS, tmp_path / "configs")
    for value, kind in (("2026_11_28", "int"), ("1e3", "float"), ("off", "bool")):
        (tmp_path / "configs/log/mine.yaml").write_text(f"defaults: [default]\nwandb_project: {value}\n")
        if value == "1e3":
            (tmp_path / "configs/log/mine.yaml").write_text("defaults: [default]\nwandb_project: 1.0e+3\n")
        with pytest.raises(ConfigError, match=f"log.wandb_project=.*YAML made a {kind}.*put it in quotes"):
            compose(["run.name=a", "data.path=d", "log=mine"], tmp_path / "configs")
        assert compose(["run.name=a", "data.path=d", "log=mine", "log.wandb_project=5"], tmp_path / "configs")
