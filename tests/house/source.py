"""Modules of a source tree and what they import, read with ast: nothing is executed."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Module:
    """One source file: its dotted name, its file, its folder's top package folder, and its syntax tree."""

    name: str
    path: Path
    top: Path
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        """Whether the file is an `__init__.py`."""
        return self.path.name == "__init__.py"

    def at(self, node: ast.AST) -> str:
        """Place of a node, for a message."""
        return f"{self.name}:{node.lineno}"


@dataclass(frozen=True)
class Import:
    """One arrow: `importer` imports `imported` (a module of ours where there is one of that name)."""

    importer: str
    imported: str
    line: int
    typing_only: bool = False

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def read_modules(top: Path, name: str) -> dict[str, Module]:
    """All modules below the folder `top`, which is imported as `name`, by dotted name."""
    found = {}
    for path in sorted(top.rglob("*.py")):
        parts = [name, *path.relative_to(top).with_suffix("").parts]
        dotted = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[dotted] = Module(dotted, path, top, ast.parse(path.read_text(encoding="utf-8")))
    return found


def read_imports(modules: Mapping[str, Module], known: Mapping[str, Module] | None = None) -> list[Import]:
    """Every import of `modules`, in functions too. Names are resolved among `known` (default: `modules`)."""
    known = modules if known is None else known
    return [found for module in modules.values() for found in _imports_of(module, known)]


def _imports_of(module: Module, known: Mapping[str, Module]) -> Iterator[Import]:
    for node, typing_only in _walk(module.tree, False):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _base(module, node)
            targets = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        elif isinstance(node, ast.Call) and _last_name(node.func) in ("import_module", "__import__"):
            targets = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        for target in dict.fromkeys(targets):
            yield Import(module.name, target, node.lineno, typing_only)


def _walk(node: ast.AST, typing_only: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, and whether it stands under `if TYPE_CHECKING:`."""
    yield node, typing_only
    if isinstance(node, ast.If) and _last_name(node.test) == "TYPE_CHECKING":
        for child in node.body:
            yield from _walk(child, True)
        for child in node.orelse:
            yield from _walk(child, typing_only)
        return
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, typing_only)


def _base(module: Module, node: ast.ImportFrom) -> str:
    """Absolute name of the module that a `from ... import` names."""
    if node.level == 0:
        return node.module or ""
    parts = module.name.split(".")
    parts = parts[: len(parts) - node.level + (1 if module.is_package else 0)]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _last_name(node: ast.AST) -> str:
    """`c` of `a.b.c`, or of plain `c`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
