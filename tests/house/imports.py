"""Rules on imports: between packages, between the layers of one package, and no cycles."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tests.house.source import Import


def wrong_direction(imports: Iterable[Import], may_import: Mapping[str, Collection[str]]) -> list[str]:
    """Imports between our packages that the table does not allow.

    `may_import` has a line for every package of ours; one with an empty collection imports none of the others.
    """
    wrong = []
    for found in imports:
        here, there = found.importer.partition(".")[0], found.imported.partition(".")[0]
        if there in may_import and there != here and there not in may_import[here]:
            wrong.append(str(found))
    return wrong


@dataclass(frozen=True)
class Layers:
    """The order of rooms in one package. A room is a folder, or a module, directly below the package.

    Attributes:
        package: its name.
        order: groups of rooms, the lowest first. A room imports itself and all rooms of lower groups, nothing else.
        beside: rooms that stand beside the order, with the rooms that each imports.
        free: rooms that import what they like, and that no other room imports.
        exceptions: (importer, imported) module pairs that are allowed all the same, each with its reason.
    """

    package: str
    order: Sequence[Collection[str]]
    beside: Mapping[str, Collection[str]] = field(default_factory=dict)
    free: Collection[str] = ()
    exceptions: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def allowed(self) -> dict[str, set[str]]:
        """Rooms that each room may import; the package's own `__init__` is the room ""."""
        allowed: dict[str, set[str]] = {"": set()}
        below = {""}
        for group in self.order:
            allowed |= {room: {room, *below} for room in group}
            below |= set(group)
        allowed |= {room: {room, "", *rooms} for room, rooms in self.beside.items()}
        return allowed | {room: {*allowed, *self.free} for room in self.free}

    def room(self, module: str) -> str | None:
        """Room of a module; None if the module is not of this package."""
        package, _, rest = module.partition(".")
        return rest.partition(".")[0] if package == self.package else None


def wrong_layer(imports: Iterable[Import], layers: Layers) -> list[str]:
    """Imports that climb, rooms that the table does not know, and exceptions that no import needs any more."""
    allowed, wrong, used = layers.allowed(), [], set()
    for found in imports:
        here, there = layers.room(found.importer), layers.room(found.imported)
        if here is None or there is None:
            continue
        if here not in allowed:
            wrong.append(f"{found.importer}: the room {here!r} is not in the table of layers")
        elif there not in allowed[here]:
            pair = (found.importer, found.imported)
            if pair not in layers.exceptions:
                wrong.append(str(found))
            used.add(pair)
    unused = [f"the exception {pair} is not needed" for pair in layers.exceptions if pair not in used]
    return list(dict.fromkeys(wrong)) + unused


def cycles(imports: Iterable[Import]) -> list[list[str]]:
    """Groups of modules that import one another in a circle (function-level imports count, typing-only ones do not).

    They are the strongly connected components of more than one module (Tarjan, SIAM J. Comput. 1972).
    """
    arrows: dict[str, set[str]] = {}
    for found in imports:
        if not found.typing_only and found.importer != found.imported:
            arrows.setdefault(found.importer, set()).add(found.imported)
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    circles: list[list[str]] = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        stack.append(module)
        for target in sorted(arrows.get(module, ())):
            if target not in number:
                visit(target)
                lowest[module] = min(lowest[module], lowest[target])
            elif target in stack:
                lowest[module] = min(lowest[module], number[target])
        if lowest[module] == number[module]:
            at = stack.index(module)
            if len(stack) - at > 1:
                circles.append(sorted(stack[at:]))
            del stack[at:]

    for module in sorted(arrows):
        if module not in number:
            visit(module)
    return sorted(circles)
