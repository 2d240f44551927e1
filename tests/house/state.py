"""Rule on state: no process group or device mesh is made at import, and no function changes a module's names."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.house.source import Module

_MAKERS = frozenset(
    ["DeviceMesh", "from_group", "init_device_mesh", "init_process_group", "initialize_model_parallel", "new_group"]
)
_PLAIN_VALUES = {"Replicate", "Shard", "StateDictOptions"}  # of torch.distributed, but no group or mesh is in them
_CHANGES = {"add", "append", "clear", "extend", "insert", "pop", "remove", "setdefault", "update"}


def import_time_groups(module: Module) -> list[str]:
    """Calls, when the module is imported, into torch.distributed or of a maker of process groups and meshes."""
    aliases = _aliases(module.tree)
    wrong = []
    for node in _at_import(module.tree):
        if isinstance(node, ast.Call):
            first, *rest = ast.unparse(node.func).split(".")
            called = ".".join([aliases.get(first, first), *rest])
            last = called.rpartition(".")[2]
            if last in _MAKERS or (called.startswith("torch.distributed.") and last not in _PLAIN_VALUES):
                wrong.append(f"{module.at(node)} calls {called} at import")
    return wrong


def module_state(module: Module) -> list[str]:
    """`global` statements, and functions that change a container which is a name of the module."""
    own = {target.id for node in module.tree.body for target in _targets(node) if isinstance(target, ast.Name)}
    wrong = []
    for function in ast.walk(module.tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            shared = own - _local_names(function)
            wrong += [f"{module.at(node)} {what}" for node, what in _changes(function, shared)]
    return list(dict.fromkeys(wrong))


def _changes(function: ast.AST, shared: set[str]) -> Iterator[tuple[ast.AST, str]]:
    for node in ast.walk(function):
        if isinstance(node, ast.Global):
            yield node, f"global {', '.join(node.names)}"
        for target in _targets(node):
            if isinstance(target, ast.Subscript | ast.Attribute) and _is_one_of(target.value, shared):
                yield node, f"changes {ast.unparse(target)}"
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and called.attr in _CHANGES and _is_one_of(called.value, shared):
            yield node, f"changes {ast.unparse(called)}"


def _at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run at import: all but the bodies of functions and of `if __name__ == "__main__":`."""
    yield node
    if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
        return
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        outside = [*getattr(node, "decorator_list", []), *node.args.defaults, *filter(None, node.args.kw_defaults)]
    else:
        outside = ast.iter_child_nodes(node)
    for child in outside:
        yield from _at_import(child)


def _aliases(tree: ast.Module) -> dict[str, str]:
    """Local name to full name, of everything that is imported anywhere in the module."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _targets(node: ast.AST) -> list[ast.AST]:
    """Expressions that a statement assigns to or deletes."""
    if isinstance(node, ast.Assign | ast.Delete):
        return list(node.targets)
    return [node.target] if isinstance(node, ast.AnnAssign | ast.AugAssign) else []


def _local_names(function: ast.AST) -> set[str]:
    """Names that a function binds itself: its arguments and whatever it stores to."""
    stored = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    declared = {name for node in ast.walk(function) if isinstance(node, ast.Global) for name in node.names}
    return (stored | {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}) - declared


def _is_one_of(node: ast.AST, names: set[str]) -> bool:
    return isinstance(node, ast.Name) and node.id in names
