"""Every command in the README and in docs/ is one that works: its options are read by the programs' own parsers."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mmtrain.config.cli import compose
from mmtrain.parallel.layout import plan_layout
from mmtrain.runs.compare import LayoutRun
from tests.dist.runs import environment

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES if page.name != "options.md")  # which is generated
_FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.M | re.S)
_BLOCKS = [line for language, block in _FENCED if not language for line in block.replace("\\\n", " ").splitlines()]
_INLINE = [
    " ".join(text.split()) for text in re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", TEXT, flags=re.M | re.S))
]
COMMANDS = [line.split("   #")[0].strip() for line in _BLOCKS + _INLINE]


def commands(program: str) -> list[str]:
    return [line for line in COMMANDS if program in line and not line.startswith("launch/")]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "launch" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def after(line: str, program: str) -> list[str]:
    return shlex.split(line.partition(program)[2])


@pytest.mark.parametrize("line", [c for c in commands("launch/pretrain.py ") if "-m model" not in c])
def test_pretrain_options_compose_and_validate(line: str) -> None:
    assert compose(after(line, "launch/pretrain.py"), ROOT / "configs").run.name


def test_submissions_parse_and_compose() -> None:
    lines = commands("launch/submit.py ")
    assert len(lines) >= 2
    for line in lines:
        if "=" in line:  # not a mere mention
            _, overrides = script("submit").parse(after(line, "launch/submit.py"))
            overrides += [] if "run.name=" in line else ["run.name=x", "data.path=x"]
            assert compose(overrides, ROOT / "configs").cluster.scheduler == "slurm"


def test_prepare_and_generate_options_parse() -> None:
    prepare, generate = commands("launch/prepare.py "), commands("launch/generate.py ")
    assert prepare and generate and len(commands("launch/pretrain.py ")) >= 3
    for line in prepare:
        script("prepare").parse(after(line, "launch/prepare.py"))
    with_images = commands("launch/prepare_images.py ")
    assert len(with_images) >= 2
    for line in with_images:
        script("prepare_images").parse(after(line, "launch/prepare_images.py"))
    looked_into = commands("launch/checkpoint.py ")
    assert len(looked_into) >= 3
    for line in looked_into:
        script("checkpoint").parse(after(line, "launch/checkpoint.py"))
    profiled = commands("launch/profile_step.py ")
    assert len(profiled) >= 2
    for line in profiled:
        _, overrides = script("profile_step").parse(after(line, "launch/profile_step.py"))
        assert compose(overrides, ROOT / "configs").run.name and not any(text.startswith("--") for text in overrides)
    evaluated = commands("launch/eval.py ")
    assert len(evaluated) >= 2
    for line in evaluated:
        evaluation = script("eval")
        options = evaluation.parse(after(line, "launch/eval.py"))
        assert options.images or evaluation.request_of(options).tasks  # whose file of questions is not here
    serving = commands("launch/serve.py ")
    assert len(serving) >= 2
    for line in serving:
        script("serve").parse(after(line, "launch/serve.py"))
    for line in generate:
        script("generate").parse(after(line, "launch/generate.py"))


def test_layouts_to_compare_fit() -> None:
    lines = commands("launch/compare.py ")
    assert lines
    for line in lines:
        options, overrides = script("compare").parse(after(line, "launch/compare.py"))
        for layout in map(LayoutRun, options.layout):
            config = compose([*overrides, *layout.overrides, "run.name=x"], ROOT / "configs")
            plan_layout(layout.processes, config.parallel, config.model, [p.seq_len for p in config.stage.phases])


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {line.split()[1] for line in COMMANDS if re.match(r"make [a-z-]+", line)}
    assert {"pretrain", "test"} <= named <= targets


def test_folders_of_the_map_exist() -> None:
    for path in re.findall(r"^\| `([^`]+)` \|", README.partition("## Where things are")[2].partition("##")[0], re.M):
        assert (ROOT / path).exists(), path


def test_a_visitor_reads_it_in_two_minutes() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_imports_are_silent() -> None:
    code = "import mmtrain, mmdata, mmkernels, mmtrain.config.cli, mmtrain.train.trainer, mmtrain.infer"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == done.stderr == ""
