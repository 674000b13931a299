"""Find the tests that carry the marker ``paper``, without importing them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


def marked_tests(folder: Path) -> dict[str, list[str]]:
    """Scan a folder of tests for ``pytest.mark.paper("Lemma 2.7", ...)``.

    A marker counts for the function or class that it decorates (inside ``parametrize`` too), and
    for the whole file where it stands elsewhere, as in ``pytestmark``.

    Args:
        folder: The folder, searched with all its subfolders.

    Returns:
        For each statement named by a marker, the tests as ``file::name``, with the file relative
        to ``folder``.

    Raises:
        ValueError: A marker's argument is not a string written out in full.
    """
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.py")):
        file = path.relative_to(folder).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        for place, call in _markers(tree, ()):
            for statement in _names(call, f"{file}:{call.lineno}"):
                tests = found.setdefault(statement, [])
                test = "::".join((file, *place))
                if test not in tests:
                    tests.append(test)
    return found


def _markers(node: ast.AST, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], ast.Call]]:
    """Every marker below a node, with the names of the classes and functions it belongs to."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _markers(child, (*place, child.name))
        elif isinstance(child, ast.Call) and ast.unparse(child.func) == "pytest.mark.paper":
            yield place, child
        else:
            yield from _markers(child, place)


def _names(call: ast.Call, where: str) -> Iterator[str]:
    for argument in call.args:
        if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
            raise ValueError(f"{where}: {ast.unparse(argument)} is not a string written out")
        yield argument.value
