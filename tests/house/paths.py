"""Rule on paths: no module of a library finds files above its own package."""

from __future__ import annotations

import ast
import re

from tests.house.source import Module

_ABOVE_ALL = 99  # levels of a climb whose height the source does not tell
_DOTS = re.compile(r"(^|/)\.\.(?=/|$)")


def climbing_paths(module: Module) -> list[str]:
    """Places where a path that starts at a module's `__file__` leaves the package, or where a text is a path above.

    A path's height is counted through `.parent`, `.parents[k]`, `dirname` and "..", and through plain variables.
    """
    depth = len(module.path.relative_to(module.top).parts)  # levels up to the package's own folder
    heights: dict[str, int] = {}
    wrong: dict[int, str] = {}  # the first of a line
    passed = _parts_to_pass(module.tree)
    for node in _in_order(module.tree):
        height = _height(node.value, heights, depth) if isinstance(node, ast.Assign) else None
        if height is not None and height <= depth:  # a climb is told where it is made, not wherever its name is used
            heights |= {target.id: height for target in node.targets if isinstance(target, ast.Name)}
        if not isinstance(node, ast.expr) or node in passed or isinstance(getattr(node, "ctx", None), ast.Store):
            continue
        if (_height(node, heights, depth) or 0) > depth:
            wrong.setdefault(node.lineno, f"{module.at(node)} climbs above its package: {ast.unparse(node)}")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _DOTS.search(node.value):
            wrong.setdefault(node.lineno, f"{module.at(node)} names a path above: {node.value!r}")
    return list(wrong.values())


def _height(node: ast.AST, heights: dict[str, int], depth: int) -> int | None:
    """Levels that an expression lies above the module's file; None if it has nothing to do with a file's place."""
    if isinstance(node, ast.Name):
        return 0 if node.id == "__file__" else heights.get(node.id)
    if isinstance(node, ast.Attribute) and node.attr == "__file__":
        return depth - 1  # of some package: its __init__.py
    if isinstance(node, ast.Call) and _name(node.func) == "files" and node.args:
        return depth  # importlib.resources.files("some package"): its folder
    inner = node.value if isinstance(node, ast.Subscript) and _name(node.value) == "parents" else node
    below = [_height(child, heights, depth) for child in ast.iter_child_nodes(inner)]
    known = [height for height in below if height is not None]
    return max(known) + _steps_up(node) if known else None


def _steps_up(node: ast.AST) -> int:
    """Levels that this node alone adds to the path inside it."""
    if isinstance(node, ast.Subscript) and _name(node.value) == "parents":
        return node.slice.value + 1 if isinstance(node.slice, ast.Constant) else _ABOVE_ALL
    if isinstance(node, ast.Attribute):
        return {"parent": 1, "parents": _ABOVE_ALL}.get(node.attr, 0)
    if isinstance(node, ast.Call) and _name(node.func) == "dirname":
        return 1
    children = list(ast.iter_child_nodes(node))
    texts = [child.value for child in children if isinstance(child, ast.Constant) and isinstance(child.value, str)]
    return sum(len(_DOTS.findall(text)) for text in texts) + sum(_name(child) == "pardir" for child in children)


def _parts_to_pass(tree: ast.Module) -> set[ast.AST]:
    """Docstrings, and `path.parents` in `path.parents[k]`, whose height only the whole tells."""
    alone = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    indexed = {node.value for node in ast.walk(tree) if isinstance(node, ast.Subscript)}
    return {node for node in alone if isinstance(node, ast.Constant)} | indexed


def _in_order(node: ast.AST) -> list[ast.AST]:
    """All nodes in the order of the source, the outer before the inner."""
    return [node, *(inner for child in ast.iter_child_nodes(node) for inner in _in_order(child))]


def _name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
