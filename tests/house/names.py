"""Rule on file names: nothing that Python finds before its standard library bears the name of a standard module."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from pathlib import Path


def script_folders(root: Path) -> set[Path]:
    """Folders below `root` with a script in them (a file with `if __name__ == "__main__":`), hidden ones left out.

    Python puts the folder of a script that is run by path before the standard library.
    """
    return {
        path.parent
        for path in root.rglob("*.py")
        if not any(part.startswith(".") for part in path.relative_to(root).parts) and _is_script(path)
    }


def standard_names(folders: Iterable[Path]) -> list[Path]:
    """Modules and packages of `folders` that would be imported in place of a standard module."""
    found = [path for folder in folders for path in [*folder.glob("*.py"), *folder.glob("*/__init__.py")]]
    named = {path: path.parent.name if path.name == "__init__.py" and path.parent not in folders else path.stem
             for path in found}  # fmt: skip
    return sorted(path for path, name in named.items() if name in sys.stdlib_module_names)


def _is_script(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.If) and "'__main__'" in ast.unparse(node.test) for node in tree.body)
