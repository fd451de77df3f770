"""Draw the rooms of dit_patch and their imports: `python docs/rooms.py` writes docs/rooms.svg.

The order of the rooms is the contract `rooms` in pyproject.toml. What each is for is the first sentence of its
docstring. The arcs are the imports in grimp's graph, which import-linter checks too; those of `errors`, which everybody
imports, are left out. A test holds that the picture is current.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import grimp
import jinja2
import tomllib

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "rooms.svg"

ROW, TOP, LEFT, WIDTH, ARCS = 42, 40, 16, 820, 220
TEMPLATE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {{ width }} {{ height }}" font-family="system-ui, sans-serif"
     role="img" aria-label="The rooms of dit_patch, and which imports which">
<style>
  .room { fill: white; stroke: #9aa5b1 } .name { font-size: 14px; font-weight: 600; fill: #1f2933 }
  .about { font-size: 12px; fill: #52606d } .down { fill: none; stroke: #3e6fb0; opacity: 0.6 } .up { stroke: #c0392b }
</style>
<rect width="100%" height="100%" fill="#f5f7fa"/>
{% for room in rooms %}
<rect class="room" x="{{ left }}" y="{{ room.y - 17 }}" width="{{ right - left }}" height="34" rx="4"/>
<text class="name" x="{{ left + 12 }}" y="{{ room.y + 5 }}">{{ room.name }}</text>
<text class="about" x="{{ left + 110 }}" y="{{ room.y + 4 }}">{{ room.about }}</text>
{% endfor %}
{% for arc in arcs %}
<path class="down{{ " up" if arc.start > arc.end }}" \
d="M{{ right }} {{ arc.start + 5 }} C{{ arc.reach }} {{ arc.start + 5 }} \
{{ arc.reach }} {{ arc.end - 5 }} {{ right }} {{ arc.end - 5 }}">
<title>{{ arc.importer }} imports {{ arc.imported }}</title></path>
{% endfor %}
</svg>
"""


def room_names() -> list[str]:
    """Return the names of the rooms, from the top of the house down."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    return next(each["layers"] for each in contracts if each["id"] == "rooms")


def first_sentence(room: str) -> str:
    """Return the first sentence of the room's docstring."""
    place = ROOT / "dit_patch" / room
    path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    text = " ".join((ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split())
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0]


def imports(names: list[str]) -> list[tuple[str, str]]:
    """Return the pairs (importer, imported) of rooms; imports for type checkers alone do not count."""
    graph = grimp.build_graph("dit_patch", exclude_type_checking_imports=True, cache_dir=None)

    def is_imported(importer: str, imported: str) -> bool:
        return imported not in (importer, "errors") and graph.direct_import_exists(
            importer=f"dit_patch.{importer}", imported=f"dit_patch.{imported}", as_packages=True
        )

    return [(importer, imported) for importer in names for imported in names if is_imported(importer, imported)]


def picture() -> str:
    """Return the SVG: a row for each room, and an arc from each room to each that it imports."""
    names = room_names()
    y = {name: TOP + ROW * row for row, name in enumerate(names)}
    right = LEFT + WIDTH
    arcs = [
        {
            "importer": importer,
            "imported": imported,
            "start": y[importer],
            "end": y[imported],
            "reach": right + 16 + ARCS * abs(y[imported] - y[importer]) // (ROW * len(names)) * 5 // 4,
        }
        for importer, imported in imports(names)
    ]
    return (
        jinja2.Environment(autoescape=True, trim_blocks=True)
        .from_string(TEMPLATE)
        .render(
            rooms=[{"name": name, "about": first_sentence(name), "y": y[name]} for name in names],
            arcs=arcs,
            left=LEFT,
            right=right,
            width=right + ARCS,
            height=2 * TOP + ROW * (len(names) - 1),
        )
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(), "utf-8")
    print(PICTURE.relative_to(ROOT))
