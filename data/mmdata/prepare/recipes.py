"""Corpus recipes: files `NAME.py` in one folder, each with a function `files() -> list[Path]` that finds its inputs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from mmdata.errors import DataError


def recipe_files(name: str, folder: Path) -> list[Path]:
    """Input files of the recipe `name`, which is `folder/name.py`.

    Raises:
        DataError: there is no such recipe (with the names there are), or it finds no file.
    """
    known = sorted(path.stem for path in folder.glob("*.py"))
    if name not in known:
        raise DataError(f"--recipe {name} is not known: there are {', '.join(known) or 'none'} in {folder}")
    spec = importlib.util.spec_from_file_location(f"mmdata_recipe_{name}", folder / f"{name}.py")
    assert spec is not None and spec.loader is not None  # a .py file always has both
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    files = module.files()
    if not files:
        raise DataError(f"--recipe {name} finds no file on this machine: use --input with text of your own")
    return files
