"""Imports point one way: a room imports only rooms below it, and no modules import each other in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import verl

ROOT = Path(verl.__file__).parent.parent

# Each room with those in front of it below. Rooms of one line do not import each other.
ORDER = [
    ["errors", "units", "config"],
    ["findings", "machine", "data"],
    ["algorithms"],
    ["plan"],
    ["memory"],
    ["engine", "rollout", "reward"],
    ["agent", "tracking"],
    ["checks", "cluster"],
    ["trainer"],
    ["__main__"],
]
# Of the rollout room.
ROLLOUT_ORDER = [
    ["contract", "loop"],
    ["client", "embedded"],
    ["weights"],
    ["processes"],
    ["router"],
    ["engines"],
    ["replicas"],
]


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / "verl").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path, *, everywhere: bool) -> Iterator[str]:
    """Modules of ours that a file imports. everywhere: also in functions and for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == "verl")
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "verl":
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                yield whole if whole in MODULES else node.module


def ranks(order: list[list[str]]) -> dict[str, int]:
    return {room: rank for rank, line in enumerate(order) for room in line}


def upward(order: list[list[str]], depth: int, prefix: str) -> list[str]:
    """Imports, between the rooms at this depth of the modules' names, that do not go down."""
    rank_of, found = ranks(order), []
    for name, path in MODULES.items():
        if not name.startswith(prefix) or len(name.split(".")) <= depth:
            continue
        room = name.split(".")[depth]
        for other in imports(path, everywhere=True):
            if not other.startswith(prefix) or len(other.split(".")) <= depth:
                continue
            target = other.split(".")[depth]
            if target != room and rank_of[target] >= rank_of[room]:
                found.append(f"{name} imports {other}")
    return found


def test_every_room_has_its_place_in_the_order():
    assert {name.split(".")[1] for name in MODULES if "." in name} == set(ranks(ORDER))
    assert {name.split(".")[2] for name in MODULES if name.startswith("verl.rollout.")} == set(ranks(ROLLOUT_ORDER))


def test_rooms_import_only_rooms_below_them():
    assert upward(ORDER, 1, "verl.") == []


def test_rooms_of_the_rollout_import_only_rooms_below_them():
    assert upward(ROLLOUT_ORDER, 2, "verl.rollout.") == []


def test_no_modules_import_each_other_in_a_circle():
    """At import time: imports within functions and for types alone cannot make one."""
    graph = {name: set(imports(path, everywhere=False)) - {name} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())
