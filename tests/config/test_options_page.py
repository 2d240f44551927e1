"""The lists of options: every option has a meaning, every number a range, and the page is the code's."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmtrain.config import PretrainConfig, load_config
from mmtrain.config.allowed import above, at_least, share
from mmtrain.config.cli import compose
from mmtrain.config.elsewhere import _LIVES, elsewhere
from mmtrain.config.option_docs import group_docs, meanings, read_defaults
from mmtrain.config.option_tree import option_paths, option_type, without_none
from mmtrain.config.options_page import help_text, page
from mmtrain.errors import ConfigError
from tests.dist.runs import environment

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"


def classes(kind: type = PretrainConfig, path: str = "") -> Iterator[tuple[str, type]]:
    """Every dataclass of the configuration, those of lists too, with the name of its options."""
    yield path, kind
    for name, hint in typing.get_type_hints(kind).items():
        inner = without_none(hint)
        item = typing.get_args(inner)[0] if typing.get_origin(inner) is list else None
        if dataclasses.is_dataclass(inner):
            yield from classes(inner, f"{path}.{name}".lstrip("."))
        elif dataclasses.is_dataclass(item):
            yield from classes(item, f"{path}.{name}[0]")


GROUPS = [(path, kind) for path, kind in classes() if path]
FIELDS = [(path, field, typing.get_type_hints(kind)[field.name]) for path, kind in GROUPS
          for field in dataclasses.fields(kind)]  # fmt: skip
NUMBERS = [(f"{path}.{field.name}", field) for path, field, hint in FIELDS
           if without_none(hint) in (int, float) or getattr(without_none(hint), "__name__", "") == "Count"]  # fmt: skip


@pytest.mark.parametrize(("path", "kind"), GROUPS)
def test_every_option_has_a_meaning_and_every_meaning_an_option(path: str, kind: type) -> None:
    assert list(meanings(kind)) and set(meanings(kind)) == {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize(("option", "field"), NUMBERS)
def test_every_number_has_a_range_that_holds_its_default(option: str, field: dataclasses.Field) -> None:
    limits = field.metadata["range"]
    for wrong in (-1, math.nan, math.inf, -math.inf):
        assert wrong not in limits, option
    if isinstance(field.default, int | float):
        assert field.default in limits


@pytest.fixture(scope="module")
def values() -> dict:
    """A whole configuration with an entry in every list."""
    given = ["model=tiny_vit", "run.name=a", "data.sources=[{path: b}]", "stage.phases[0].sources=[{path: b}]",
             "stage.phases[0].buckets=[{name: c, share: 1}]", "data.long_sources=[{path: b}]",
             "stage.phases[0].parallel={tp: 1}", "stage.preference={beta: 0.1}"]  # fmt: skip
    return dataclasses.asdict(compose(given, CONFIGS))


@pytest.mark.parametrize(("option", "field"), NUMBERS)
def test_numbers_outside_are_refused_by_name(values: dict, option: str, field: dataclasses.Field) -> None:
    *above_it, last = option.replace("[", ".").replace("]", "").split(".")
    for wrong in (-1, math.nan, math.inf):
        changed = copy.deepcopy(values)
        group = changed
        for part in above_it:
            group = group[int(part)] if part.isdigit() else group[part]
        group[last] = wrong
        with pytest.raises(ConfigError) as caught:
            load_config(changed)
        assert caught.value.option == option and "\n" not in str(caught.value)


def test_ranges_say_what_they_are() -> None:
    assert [str(mark["range"]) for mark in (at_least(1), above(0), share(), at_least(0, 9), above(0, 9))] == [
        "at least 1", "above 0", "at least 0 and below 1", "at least 0 and at most 9", "above 0 and at most 9",
    ]  # fmt: skip


def test_the_files_of_the_groups_and_the_dataclasses_have_the_same_defaults() -> None:
    defaults, chosen = read_defaults(CONFIGS)
    assert chosen["model"] == "tiny" and chosen["stage"] == "pretrain"
    for group in ("parallel", "data", "optim", "log", "checkpoint", "cluster", "run"):
        for field in dataclasses.fields(typing.get_type_hints(PretrainConfig)[group]):
            if field.default is not dataclasses.MISSING:
                assert defaults[group][field.name] == field.default, f"{group}.{field.name}"


def test_the_page_is_current() -> None:
    assert (ROOT / "docs/options.md").read_text() == page(CONFIGS), "make docs"


def test_help_names_every_option_and_every_file() -> None:
    text = help_text(CONFIGS, "launch/pretrain.py", 100)
    for option in option_paths(PretrainConfig):
        assert f"\n  {option}  (" in text, option
    for name in ("stage.phases[0].seq_len", "stage.phases[0].lr[0].kind", "stage.phases[0].batch[0].at",
                 "data.sources[0].path"):  # fmt: skip
        assert f"\n  {name}  (" in text
    assert "optim.name  (text; adamw, apex, cpu_offload; default adamw)" in text
    assert "stage=      pretrain, curriculum, long_ctx, long_ctx_128k" in text and "${model.name}" in text
    assert max(map(len, text.splitlines())) <= 120
    for doc in group_docs(CONFIGS):
        assert all(option.meaning for option in doc.options)


@pytest.mark.parametrize("script", ["pretrain", "compare", "generate", "eval", "prepare", "checkpoint"])
def test_help_of_every_launcher_needs_neither_torch_nor_hydra(script: str) -> None:
    code = (
        "import runpy, sys\nsys.argv = ['x', '--help']\ntry:\n    runpy.run_path(sys.argv.pop(), run_name='__main__')\n"
        "except SystemExit:\n    pass\nprint(sorted({'torch', 'hydra'} & set(sys.modules)))\n"
    ).replace("sys.argv.pop()", repr(f"launch/{script}.py"))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]" and len(done.stdout.splitlines()) > 10


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("lr", "stage.phases[0].lr[0].end"), ("optim.lr", "stage.phases[0].lr[0].end"),
        ("seq_len", "stage.phases[0].seq_len"), ("batch_size", "stage.phases[0].batch[0].tokens"),
        ("gradient_accumulation", "parallel.micro_batch_rows"), ("tokens", "stage.phases[0].tokens"),
        ("steps", "run.max_steps"), ("warmup_steps", "stage.phases[0].lr[0].tokens"), ("dp", "torchrun"),
        ("train.gradient_accumulation_steps", "stage.phases[0].batch[0].tokens"), ("rope_theta", "rope_base"),
        ("optim.max_grad_norm", "optim.clip_grad=1.0"), ("save_interval", "checkpoint.interval"),
    ],
)  # fmt: skip
def test_names_of_other_programs_point_to_where_they_live(name: str, place: str) -> None:
    for prefix in ("", "+", "++"):
        with pytest.raises(ConfigError) as caught:
            compose(["run.name=a", "data.path=b", f"{prefix}{name}=3"], CONFIGS)
        assert caught.value.problem == "unknown option" and place in caught.value.fix


def test_places_of_other_names_exist() -> None:
    for place in _LIVES:
        for option in re.findall(r"\b(?:model|stage|parallel|optim|checkpoint|log|run|data)\.[a-z_\[\]0-9.]+", place):
            named = re.sub(r"\[(\d+)\]", r".\1", option.rstrip("."))
            if named not in ("launch.prepare.py",):
                assert option_type(PretrainConfig, named) is not None, option
    for path in option_paths(PretrainConfig):  # an option of our own is never told to be elsewhere
        if elsewhere(path) is not None:
            assert path.split(".")[-1] in elsewhere(path) or path == "parallel.dp", path
