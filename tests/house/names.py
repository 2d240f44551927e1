"""Rule on file names: nothing that Python finds before its standard library bears the name of a standard module."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterable
from pathlib import Path


def script_folders(root: Path) -> set[Path]:
    """Folders below `root` with a script in them (a file with `if __name__ == "__main__":`), hidden ones left out.

    Python puts the folder of a script that is run by path before the standard library.
    """
    found = set()
    for here, folders, names in os.walk(root):
        folders[:] = [folder for folder in folders if folder[0] != "."]
        if any(_is_script(Path(here, name)) for name in names if name.endswith(".py")):
            found.add(Path(here))
    return found


def standard_names(folders: Iterable[Path]) -> list[Path]:
    """Modules and packages of `folders` that would be imported in place of a standard module."""
    found = []
    for folder in folders:
        named = [(path.stem, path) for path in folder.glob("*.py")]
        named += [(path.parent.name, path) for path in folder.glob("*/__init__.py")]
        found += [path for name, path in named if name in sys.stdlib_module_names]
    return sorted(found)


def _is_script(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.If) and "'__main__'" in ast.unparse(node.test) for node in tree.body)
