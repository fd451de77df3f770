"""The code is built as docs/architecture.md says: which room imports which, and how large files and classes may be."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dit_patch"
FILES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")}

MOST_LINES = 400
LONGER_FILES: dict[str, str] = {}
"""Files that may be longer, each with the reason."""

MOST_ATTRIBUTES = 12
LARGER_CLASSES: dict[str, str] = {
    "report/rows.py:SiteStats": "a row of the report, which users read by these names",
    "spec/model.py:Site": "what a spec may say of a site",
    "step_cache/config.py:StepCache": "the knobs that users turn",
    "bench/rotary/rows.py:Row": "a row of the CSV",
    "bench/step_cache/harness.py:Summary": "a row of the CSV",
}
"""Classes that may have more attributes, each with the reason."""


@pytest.fixture
def rooms(monkeypatch):
    pytest.importorskip("grimp")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    yield __import__("rooms")
    sys.modules.pop("rooms")


@pytest.mark.parametrize("contract", ["rooms", "circles"])
def test_imports_go_down_and_in_no_circle(contract, monkeypatch, capsys):
    linter = pytest.importorskip("importlinter.cli")
    monkeypatch.chdir(ROOT)
    broken = linter.lint_imports(limit_to_contracts=(contract,), no_cache=True, no_logo=True)
    assert not broken, capsys.readouterr().out


def test_the_picture_of_the_rooms_is_current(rooms):
    assert rooms.PICTURE.read_text("utf-8") == rooms.picture(), "run: python docs/rooms.py"


def test_the_page_on_the_architecture_names_every_room_in_order(rooms):
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    named = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert [name for name in named if name in rooms.room_names()] == rooms.room_names()


def test_no_file_is_too_long_to_be_read_in_one_go():
    lengths = {name: (PACKAGE / name).read_text("utf-8").count("\n") for name in FILES}
    longer = {name for name, length in lengths.items() if length > MOST_LINES}
    assert longer == set(LONGER_FILES)


def test_no_class_has_more_attributes_than_fit_in_the_head():
    counted = {
        f"{file}:{cls.name}": len(attributes(cls))
        for file, tree in FILES.items()
        for cls in ast.walk(tree)
        if isinstance(cls, ast.ClassDef)
    }
    larger = {name for name, count in counted.items() if count > MOST_ATTRIBUTES}
    assert larger == set(LARGER_CLASSES), {name: counted[name] for name in larger}


def test_nobody_is_known_by_a_bound_method_of_theirs():
    """But for what follows any callable, whoever's, to all that it depends on."""
    asking = {str(file) for file, tree in FILES.items() for node in ast.walk(tree) if asks_for_self(node)}
    assert asking == {"memo/reachable.py"}


def attributes(cls: ast.ClassDef) -> set[str]:
    """Return the names of what an instance holds: fields that are declared, slots, and what is set on `self`."""
    names = set()
    for statement in cls.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            names |= set() if "ClassVar" in ast.unparse(statement.annotation) else {statement.target.id}
        elif isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__slots__":
            names |= set(ast.literal_eval(statement.value))
        elif isinstance(statement, ast.FunctionDef):
            names |= set(set_on_self(statement))
    return names


def set_on_self(function: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def asks_for_self(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr == "__self__"
        or isinstance(node, ast.Constant)
        and node.value == "__self__"
    )
