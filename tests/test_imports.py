"""The rules that hold the house together, each with a planted violation that shows that its checker can fail.

Everything is read with ast, nothing is executed. A failure names the module, the line and what it does there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.house.imports import Layers, cycles, wrong_direction, wrong_layer
from tests.house.names import script_folders, standard_names
from tests.house.paths import climbing_paths
from tests.house.source import Module, read_imports, read_modules
from tests.house.state import import_time_groups, module_state

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"launch": "launch", "mmtrain": "mmtrain", "mmkernels": "kernels/mmkernels", "mmdata": "data/mmdata"}

# Which of our packages each of them may import; `tests` and `bench` (kernels/bench) are nobody's.
MAY_IMPORT = {
    "launch": ["mmtrain", "mmkernels", "mmdata"],
    "mmtrain": ["mmkernels", "mmdata"],
    "mmkernels": [],
    "mmdata": [],
    "tests": [],
    "bench": [],
}

# A room imports rooms of lower lines only, so rooms of one line do not import each other.
LAYERS = Layers(
    "mmtrain",
    order=[
        ["errors", "json_text", "output"],
        ["command_line", "config"],
        ["model"],
        ["vision"],
        ["build"],
        ["parallel"],
        ["optim", "log", "health", "checkpoint"],
        ["evals", "hf", "report", "scaling"],
        ["train"],
        ["runs"],
        ["__main__"],
    ],
    # Decoding needs no training code.
    beside={
        "infer": [
            "checkpoint",
            "hf",
            "parallel",
            "build",
            "vision",
            "model",
            "config",
            "command_line",
            "output",
            "json_text",
            "errors",
        ]
    },
    free=["bench"],
    exceptions={},  # (importer, imported): the reason; there should be none
)


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    """Every module of the packages and of launch/, by dotted name."""
    trees = [read_modules(ROOT / folder, top) for top, folder in FOLDERS.items()]
    return {name: module for tree in trees for name, module in tree.items()}


@pytest.fixture(scope="module")
def libraries(modules: dict[str, Module]) -> list[Module]:
    """The modules that others import: all but launch/ and the benches."""
    return [module for name, module in modules.items() if not {"launch", "bench"} & set(name.split("."))]


def show(wrong: list) -> None:
    """Fail with a line for each finding."""
    assert not wrong, "\n".join(["", *map(str, wrong)])


def test_every_package_is_read(modules: dict[str, Module]) -> None:
    for name in ("launch.pretrain", "mmtrain.errors", "mmkernels.moe", "mmdata.rows.loader"):
        assert name in modules


def test_packages_import_one_way(modules: dict[str, Module]) -> None:
    show(wrong_direction(read_imports(modules), MAY_IMPORT))


def test_rooms_of_mmtrain_import_downwards(modules: dict[str, Module]) -> None:
    show(wrong_layer(read_imports(modules), LAYERS))


def test_modules_import_in_no_circle(modules: dict[str, Module]) -> None:
    show(cycles(read_imports(modules)))


def test_no_library_reaches_above_its_package(libraries: list[Module]) -> None:
    show([found for module in libraries for found in climbing_paths(module)])


def test_no_process_group_is_made_at_import(libraries: list[Module]) -> None:
    show([found for module in libraries for found in import_time_groups(module)])


def test_no_function_changes_its_module(libraries: list[Module]) -> None:
    show([found for module in libraries for found in module_state(module)])


def test_no_file_beside_a_script_hides_a_standard_module() -> None:
    on_the_path = {ROOT, ROOT / "kernels", ROOT / "data"}
    folders = script_folders(ROOT) | on_the_path
    assert {ROOT / "launch", ROOT / "kernels" / "bench" / "gpu"} <= folders
    show(standard_names(folders))


# Planted violations: a small package in a temporary folder, with the error that the rule is there to find.


@pytest.fixture
def plant(tmp_path: Path) -> Callable[..., dict[str, Module]]:
    """Writes `{dotted name: source}` as files and reads them back as modules of the package `house`."""

    def write(sources: dict[str, str]) -> dict[str, Module]:
        for name, source in sources.items():
            path = tmp_path / "house" / f"{name.replace('.', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        return read_modules(tmp_path / "house", "house")

    return write


def test_planted_direction(plant: Callable[..., dict[str, Module]]) -> None:
    sources = {"a": "import numpy\nimport house.b\n", "b": "def f():\n    from upstairs.x import y\n"}
    table = {"upstairs": ["house"], "house": []}
    assert wrong_direction(read_imports(plant(sources)), table) == ["house.b:2 imports upstairs.x"]
    assert wrong_direction(read_imports(plant(sources)), {**table, "house": ["upstairs"]}) == []
    called = plant({"c": "import importlib\nimportlib.import_module('upstairs.z')\n"})
    assert "house.c:2 imports upstairs.z" in wrong_direction(read_imports(called), table)


def test_planted_layers(plant: Callable[..., dict[str, Module]]) -> None:
    imports = read_imports(
        plant(
            {
                "__init__": "",
                "errors": "from house import model\n",  # up
                "model.__init__": "from ..errors import E\nfrom . import block\n",
                "model.block": "import house\n",
                "log": "from house.model import block\n",
                "health": "if TYPE_CHECKING:\n    import numpy\n    from house import log\n",  # a sibling
                "infer": "from house.model import block\nfrom house.log import x\n",  # beside, not on log
                "bench": "import house.infer, house.log\n",
                "cellar": "import house.errors\n",  # not in the table
            }
        )
    )
    order, beside = [["errors"], ["model"], ["log", "health"]], {"infer": ["model"]}
    layers = Layers("house", order, beside, free=["bench"])
    assert sorted(wrong_layer(imports, layers)) == [
        "house.cellar: the room 'cellar' is not in the table of layers",
        "house.errors:1 imports house.model",
        "house.health:3 imports house.log",
        "house.infer:2 imports house.log",
    ]
    kept = Layers("house", order, beside, ["bench"], {("house.health", "house.log"): "a reason", ("house.a", "b"): ""})
    found = wrong_layer(imports, kept)
    assert "house.health:3 imports house.log" not in found and "the exception ('house.a', 'b') is not needed" in found


def test_planted_circles(plant: Callable[..., dict[str, Module]]) -> None:
    sources = {
        "a": "from house import b\n",
        "b": "from . import c\n",
        "c": "def f():\n    import house.a\n",  # closes the circle in a function
        "d": "from house import a, e\n",
        "e": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.d import x\n",
    }
    assert cycles(read_imports(plant(sources))) == [["house.a", "house.b", "house.c"]]


@pytest.mark.parametrize(
    ("line", "climbs"),
    [
        ("HERE = Path(__file__).parent", False),
        ("HERE = Path(__file__).resolve().parents[1]", False),
        ("HERE = Path(__file__).resolve().parents[2]", True),
        ("HERE = Path(__file__).parent.parent.parent / 'configs'", True),
        ("HERE = Path(__file__).parent\nTOP = HERE.parent.parent", True),
        ("HERE = Path(__file__).parent\nTOP = HERE / 'tables'", False),
        ("HERE = dirname(dirname(dirname(__file__)))", True),
        ("HERE = join(dirname(__file__), pardir, pardir)", True),
        ("HERE = Path(house.__file__).parent.parent", True),
        ("HERE = Path(str(files('house'))) / 'tables'", False),
        ("HERE = Path(str(files('house'))).parent", True),
        ("for up in Path(__file__).parents:\n    pass", True),
        ("open('../configs/x.yaml')", True),
        ("print('and so on ...', path.parent.parent.parent)", False),
    ],
)
def test_planted_paths(plant: Callable[..., dict[str, Module]], line: str, climbs: bool) -> None:
    module = plant({"room.module": f'"""It is in ../room, as said."""\n{line}\n'})["house.room.module"]
    assert bool(climbing_paths(module)) == climbs


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("import torch.distributed as dist\nGROUP = dist.new_group()", "calls torch.distributed.new_group"),
        ("from torch.distributed import get_rank\nRANK = get_rank()", "calls torch.distributed.get_rank"),
        ("from somewhere import DeviceMesh as Mesh\nclass A:\n    mesh = Mesh('cpu', [0])", "DeviceMesh"),
        ("import torch\ndef f(n=torch.distributed.get_world_size()): ...", "get_world_size"),
        ("import torch.distributed as dist\ndef f():\n    return dist.new_group()", None),
        ("import torch.distributed as dist\nif __name__ == '__main__':\n    dist.init_process_group()", None),
        ("from torch.distributed.tensor import Shard\nROWS = Shard(0)", None),
    ],
)
def test_planted_groups(plant: Callable[..., dict[str, Module]], line: str, found: str | None) -> None:
    messages = import_time_groups(plant({"module": line})["house.module"])
    assert (found in messages[0]) if found else messages == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("N = 0\ndef f():\n    global N\n    N = 1", "global N"),
        ("SEEN = {}\ndef f(x):\n    SEEN[x] = 1", "changes SEEN[x]"),
        ("SEEN = []\ndef f(x):\n    SEEN.append(x)", "changes SEEN.append"),
        ("SEEN: dict[int, int] = {}\nclass A:\n    def f(self, x):\n        del SEEN[x]", "changes SEEN[x]"),
        ("SEEN = {}\ndef f(SEEN, x):\n    SEEN[x] = 1", None),
        ("SEEN = {}\ndef f(x):\n    SEEN = {}\n    SEEN[x] = 1\n    return SEEN", None),
        ("SEEN = {}\nSEEN[0] = 1\ndef f(x):\n    return SEEN[x]", None),
    ],
)
def test_planted_state(plant: Callable[..., dict[str, Module]], line: str, found: str | None) -> None:
    messages = module_state(plant({"module": line})["house.module"])
    assert (found in messages[0]) if found else messages == []


def test_planted_names(tmp_path: Path) -> None:
    sources = ("run.py", "profile.py", "queue/__init__.py", "queue/run.py", "logging/json.py", "../lib/inspect.py")
    for path in (f"tools/{name}" for name in sources):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("if __name__ == '__main__':\n    pass\n" if path.endswith("run.py") else "")
    folders = script_folders(tmp_path)
    assert folders == {tmp_path / "tools", tmp_path / "tools/queue"}
    assert standard_names(folders) == [tmp_path / "tools/profile.py", tmp_path / "tools/queue/__init__.py"]
