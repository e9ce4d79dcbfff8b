"""Draw `docs/architecture.svg`: the rooms of `sftmix`, floor by floor, and who imports whom.

python -m tools.architecture

The arrows are the imports in the code; one that a chain of other arrows implies is left out.
`tests/test_layers.py` holds the code to FLOORS, and the picture to the code.
"""

from __future__ import annotations

import ast
import functools
import textwrap
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
PACKAGES = ("sftmix", "sftmix_kernels")

# From the ground up. A room imports from the floors below its own, and from no neighbour. The
# kernels are a package of their own, which every room may use: they are drawn below training.
FLOORS = (
    ("conventions", "methods"),
    ("runs",),
    ("data", "pairs"),
    ("templates", "model", "sftmix_kernels"),
    ("training",),
    ("recipe",),
    ("evaluation", "plan", "report", "integrations"),
    ("commands",),
    ("cli",),
    ("toy",),
)
# No rooms: the package hands out public names, `__main__` calls `cli`, `demo_data` names two files.
DOORS = ("sftmix", "__main__", "demo_data")

# `cli` imports the command that was typed, by its name.
BY_NAME = ("cli", "commands")

BOX_WIDTH, BOX_HEIGHT, GAP, STOREY = 216, 78, 30, 116


def module_name(file: Path, root: Path = ROOT) -> str:
    """Return the dotted name of a module's file."""
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def imports(root: Path = ROOT) -> dict[str, set[str]]:
    """Return what each module of both packages imports of them, inside functions too."""
    files = {
        module_name(file, root): file
        for package in PACKAGES
        for file in sorted((root / package).rglob("*.py"))
    }
    return {name: set(_imported(name, file, files)) - {name} for name, file in files.items()}


def _imported(name: str, file: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            origin = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            for alias in node.names:
                found = f"{origin}.{alias.name}"
                if found in modules or origin in modules:
                    yield found if found in modules else origin


def room(module: str) -> str:
    """Return the room of a module: the name below `sftmix`, or the package."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == "sftmix" and rest else package


def rooms(modules: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Return which other rooms each room imports from, without the doors."""
    found: dict[str, set[str]] = {}
    for module, others in modules.items():
        if room(module) not in DOORS:
            below = found.setdefault(room(module), set())
            below |= {room(other) for other in others} - {room(module), *DOORS}
    return found


def reduced(graph: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """Return the arrows that no chain of other arrows implies."""

    def reached(start: str) -> set[str]:
        return {end for below in graph[start] for end in (below, *reached(below))}

    return sorted(
        (start, end)
        for start, ends in graph.items()
        for end in ends
        if not any(end in reached(other) for other in ends - {end})
    )


def says(name: str, root: Path = ROOT) -> str:
    """Return the first sentence of a room's docstring, without the name before its colon."""
    package = root / name if name in PACKAGES else root / "sftmix" / name
    file = package / "__init__.py" if package.is_dir() else package.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    before, _, after = text.partition("\n")[0].rstrip(".").replace("`", "").partition(": ")
    return after or before


def picture(root: Path = ROOT) -> str:
    """Return the SVG."""
    graph = rooms(imports(root))
    graph[BY_NAME[0]].add(BY_NAME[1])
    floors = [[name for name in floor if name in graph] for floor in FLOORS]
    width = max(map(len, floors)) * (BOX_WIDTH + GAP) + GAP
    height = len(floors) * STOREY + GAP
    places = {
        name: (
            (width - len(floor) * (BOX_WIDTH + GAP) + GAP) / 2 + column * (BOX_WIDTH + GAP),
            height - (level + 1) * STOREY + GAP / 2,
        )
        for level, floor in enumerate(floors)
        for column, name in enumerate(floor)
    }
    arrows = [
        f'<line x1="{places[start][0] + BOX_WIDTH / 2:.0f}" '
        f'y1="{places[start][1] + BOX_HEIGHT:.0f}" x2="{places[end][0] + BOX_WIDTH / 2:.0f}" '
        f'y2="{places[end][1] - 3:.0f}"/>'
        for start, end in reduced(graph)
    ]
    boxes = [_box(name, *place, says(name, root)) for name, place in places.items()]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            'font-family="sans-serif" text-anchor="middle">',
            "<title>The rooms of sftmix and their imports, which all point down</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#777"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            '<g stroke="#777" stroke-width="1.3" marker-end="url(#tip)">',
            *arrows,
            "</g>",
            *boxes,
            "</svg>\n",
        ]
    )


def _box(name: str, x: float, y: float, text: str) -> str:
    middle = x + BOX_WIDTH / 2
    lines = textwrap.wrap(text, 36, max_lines=3, placeholder=" ...")
    small = "".join(
        f'<tspan x="{middle:.0f}" y="{y + 38 + 14 * number:.0f}">{escape(line)}</tspan>'
        for number, line in enumerate(lines)
    )
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" '
        f'fill="#eef3fb" stroke="#35598f"/><text x="{middle:.0f}" y="{y + 21:.0f}" '
        f'font-size="16">{escape(name)}</text><text font-size="11" fill="#444">{small}</text>'
    )


def main() -> None:
    """Write the picture."""
    PICTURE.write_text(picture(), encoding="utf-8")
    print(PICTURE.relative_to(ROOT))


if __name__ == "__main__":
    main()
