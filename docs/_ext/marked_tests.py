"""Find the tests that carry the markers ``paper`` and ``twin``, without importing them."""

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
        ValueError: A marker's argument is neither a string written out in full nor a name that
            its file gives to one.
    """
    found: dict[str, list[str]] = {}
    for test, names in _marked(folder, "pytest.mark.paper"):
        for statement in names:
            tests = found.setdefault(statement, [])
            if test not in tests:
                tests.append(test)
    return found


def marked_twins(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Scan a folder of tests for ``pytest.mark.twin("name of the check", "what is broken")``.

    Args:
        folder: The folder, searched with all its subfolders.

    Returns:
        For each check, for each thing broken that it rejects, the tests that show it.

    Raises:
        ValueError: A marker has not two strings written out in full.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for test, names in _marked(folder, "pytest.mark.twin"):
        if len(names) != 2:
            raise ValueError(f"{test}: a twin has the name of a check, and what is broken")
        check, broken = names
        tests = found.setdefault(check, {}).setdefault(broken, [])
        if test not in tests:
            tests.append(test)
    return found


def _marked(folder: Path, marker: str) -> Iterator[tuple[str, list[str]]]:
    """Tests with a marker, as ``file::name``, and its arguments."""
    for path in sorted(folder.rglob("*.py")):
        file, text = path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8")
        if marker not in text:  # to parse takes long
            continue
        tree = ast.parse(text, filename=str(path))
        known = _constants(tree)
        for place, call in _markers(tree, (), marker):
            yield "::".join((file, *place)), list(_names(call, known, f"{file}:{call.lineno}"))


def _constants(tree: ast.Module) -> dict[str, str]:
    """Names that the module gives to strings."""
    return {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }


def _markers(
    node: ast.AST, place: tuple[str, ...], marker: str
) -> Iterator[tuple[tuple[str, ...], ast.Call]]:
    """Every marker below a node, with the names of the classes and functions it belongs to."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _markers(child, (*place, child.name), marker)
        elif _calls(child, marker):
            yield place, child
        else:
            yield from _markers(child, place, marker)


def _calls(node: ast.AST, marker: str) -> bool:
    """Whether a node is a call of the marker."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    return marker.endswith(f".{node.func.attr}") and ast.unparse(node.func) == marker


def _names(call: ast.Call, known: dict[str, str], where: str) -> Iterator[str]:
    for argument in call.args:
        if isinstance(argument, ast.Name) and argument.id in known:
            yield known[argument.id]
        elif isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            yield argument.value
        else:
            raise ValueError(f"{where}: {ast.unparse(argument)} is not a string written out")
