"""The shape of the house: one-way arrows between the floors, and modules of readable size.

Every rule is a function from a source tree to the list of its faults, and is shown a broken tree
that it has to reject.
"""

import ast
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "manifold_sde"
# A floor may import from those below it: experiments → verification → solvers → the rest.
FLOORS = ("solvers", "verification", "experiments")
MOST_LINES = 500


def modules(package: Path) -> Iterator[tuple[str, Path, ast.Module]]:
    """The name (dots, without the package), path and syntax tree of each module."""
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        yield ".".join(parts), path, ast.parse(path.read_text(encoding="utf-8"))


def floor(module: str) -> int:
    """0 for the ground floor, then the place in FLOORS counted from 1."""
    first = module.split(".")[0]
    return FLOORS.index(first) + 1 if first in FLOORS else 0


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a module imports, at the top or in a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "import_module",
            "importlib.import_module",
            "__import__",
        ):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


def faulty_imports(package: Path) -> list[str]:
    """Imports that are relative, go up the house, or go through the links at the top."""
    faults = []
    for module, _, tree in modules(package):
        if module == "__main__":
            continue
        for line, name in imported(tree):
            first, _, rest = name.partition(".")
            where = f"{module}:{line} imports {name}"
            if name.startswith("."):
                faults.append(f"{where}: a relative import")
            elif first in FLOORS:
                faults.append(f"{where}: through the link at the top")
            elif first == package.name and floor(rest) > floor(module):
                faults.append(f"{where}: up the house")
    return faults


def long_modules(package: Path) -> list[str]:
    """Modules of more than MOST_LINES lines."""
    counts = {name: len(path.read_text().splitlines()) for name, path, _ in modules(package)}
    return [f"{name}: {count} lines" for name, count in counts.items() if count > MOST_LINES]


def shadowed_modules(package: Path) -> list[str]:
    """Modules that bear the name of something else that their package defines or exports.

    After ``from p.solve import solve`` in ``p/__init__.py``, ``p.solve`` is a function, and the
    module of that name can no longer be reached as an attribute.
    """
    faults = []
    for module, path, tree in modules(package):
        if path.name != "__init__.py":
            continue
        this = ".".join((package.name, *module.split(".")[:-1]))
        children = {child.stem for child in path.parent.iterdir() if child.name != "__init__.py"}
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module != this:
                names = [alias.asname or alias.name for alias in node.names]
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            faults += [f"{this}.{name}" for name in names if name in children]
    return faults


@pytest.mark.parametrize("faults", [faulty_imports, long_modules, shadowed_modules])
def test_the_house_is_in_order(faults: Callable[[Path], list[str]]) -> None:
    assert faults(PACKAGE) == []


@pytest.mark.parametrize("name", ["solvers", "verification"])
def test_links_at_the_top_are_relative(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert os.readlink(link) == f"manifold_sde/{name}"
    assert link.resolve() == PACKAGE / name


def write_tree(folder: Path, files: dict[str, str]) -> Path:
    package = folder / "manifold_sde"
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package


def test_allowed_imports_are_allowed(tmp_path: Path) -> None:
    package = write_tree(
        tmp_path,
        {
            "__main__.py": "from manifold_sde.experiments.cli import main\n",
            "problem.py": "import torch\nfrom manifold_sde.noise import base\n",
            "solvers/solve.py": "from manifold_sde import problem\n",
            "verification/exact.py": "import manifold_sde.solvers.solve\n",
            "experiments/cli.py": "from manifold_sde.verification import exact\n",
        },
    )
    assert faulty_imports(package) == []


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("problem.py", "from manifold_sde.solvers import solve", "up the house"),
        ("problem.py", "from manifold_sde import solvers", "up the house"),
        ("problem.py", "def f():\n    import manifold_sde.experiments.cli", "up the house"),
        ("problem.py", "import_module('manifold_sde.verification')", "up the house"),
        ("__init__.py", "from manifold_sde.solvers.solution import Solution", "up the house"),
        ("geometry/dense.py", "from manifold_sde.solvers import solve", "up the house"),
        ("solvers/solve.py", "from manifold_sde.verification import exact", "up the house"),
        ("solvers/__main__.py", "import manifold_sde.experiments", "up the house"),
        ("verification/run.py", "from manifold_sde.experiments import cli", "up the house"),
        ("experiments/cli.py", "from solvers import solve", "through the link"),
        ("problem.py", "from . import noise", "relative"),
        ("solvers/solve.py", "from ..noise import base", "relative"),
    ],
)
def test_broken_twin_faulty_imports(tmp_path: Path, file: str, line: str, fault: str) -> None:
    faults = faulty_imports(write_tree(tmp_path, {file: line}))
    assert len(faults) == 1
    assert fault in faults[0]


def test_broken_twin_long_module(tmp_path: Path) -> None:
    package = write_tree(tmp_path, {"fits.py": "x = 1\n" * 500, "long.py": "x = 1\n" * 501})
    assert long_modules(package) == ["long: 501 lines"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from manifold_sde.solvers.solve import solve", ["manifold_sde.solvers.solve"]),
        ("def solve(): ...", ["manifold_sde.solvers.solve"]),
        ("from manifold_sde.solvers import solve", []),
        ("from manifold_sde.solvers.solve import solution", []),
    ],
)
def test_broken_twin_shadowed_module(tmp_path: Path, text: str, expected: list[str]) -> None:
    package = write_tree(tmp_path, {"solvers/__init__.py": text, "solvers/solve.py": ""})
    assert shadowed_modules(package) == expected
