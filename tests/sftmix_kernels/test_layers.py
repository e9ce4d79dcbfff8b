"""Which module imports which: only downwards, and Triton not before a kernel is called."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path

import sftmix_kernels

PACKAGE = Path(sftmix_kernels.__file__).parent
MODULES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts): ast.parse(file.read_text())
    for file in PACKAGE.rglob("*.py")
    if file.name != "__init__.py"
}
USES_TRITON = {
    name
    for name, tree in MODULES.items()
    if any(isinstance(node, ast.Import) and node.names[0].name == "triton" for node in tree.body)
}


def imported(name: str, nodes: Iterable[ast.AST]) -> set[str]:
    """The package's modules that a module imports, by its relative imports."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.level:
            above = name.split(".")[: -node.level]
            source = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            inside = {f"{source}.{alias.name}".strip(".") for alias in node.names}
            found |= {source} & MODULES.keys() or inside & MODULES.keys()
    return found


def test_imports_go_round_in_no_circle() -> None:
    """Neither those of modules, nor those of rooms, in functions or not."""
    graph = {name: imported(name, ast.walk(tree)) for name, tree in MODULES.items()}
    assert sum(map(len, graph.values())) > 60
    TopologicalSorter(graph).prepare()
    rooms: dict[str, set[str]] = {}
    for name, others in graph.items():
        room = name.split(".")[0]
        rooms.setdefault(room, set()).update(other.split(".")[0] for other in others)
    TopologicalSorter({room: others - {room} for room, others in rooms.items()}).prepare()


def test_triton_waits_for_a_kernel() -> None:
    assert {"primitives", "row_chunks.kernels", "vocab_tiles.backward"} <= USES_TRITON
    for name in MODULES.keys() - USES_TRITON:
        assert not imported(name, MODULES[name].body) & USES_TRITON, name
