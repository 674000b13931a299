"""The shape of the house: one-way arrows between the floors, and modules of readable size.

Every rule is a function from a source tree to the list of its faults, and is shown a broken tree
that it has to reject.
"""

import ast
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "manifold_sde"
# From the ground up: a module or folder may import from its own floor and from those below it.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "paper"),
    ("arguments", "number_arrays", "reverse_mode"),
    (
        "rng",
        "deadline",
        "progress",
        "threads",
        "writing",
        "html_page",
        "derivatives",
        "remedies",
        "columns",
        "drawing",
    ),
    ("compile",),
    ("loss",),
    (
        "torch_norms",
        "torch_algebra",
        "torch_layers",
        "loss_trials",
        "loss_checks",
        "scale_invariance",
    ),
    ("ghost_products",),
    ("noise",),
    ("symbolic", "networks"),
    ("problem",),
    ("points", "problems"),
    ("geometry",),
    ("equations",),
    ("scheduler_values", "schedules", "time_scale"),
    ("sdes", "group_sdes"),
    ("description",),
    ("training",),
    ("",),  # manifold_sde itself, which shows what is below
    ("solvers",),
    ("verification",),
    ("experiments",),
    ("__main__",),
)
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
LINKS = ("solvers", "verification", "experiments")
MOST_LINES = 500


@functools.cache
def modules(package: Path) -> list[tuple[str, Path, ast.Module]]:
    """The name (dots, without the package), path and syntax tree of each module."""
    paths = sorted(package.rglob("*.py"))
    names = [".".join(path.relative_to(package).with_suffix("").parts) for path in paths]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    return list(zip(names, paths, trees, strict=True))


def floor(module: str) -> int | None:
    """The number of the floor of a module, or of a name of the package; ``None`` for none."""
    first = module.removesuffix("__init__").split(".")[0]
    return FLOOR_OF.get(first)


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
    """Imports that are relative, go up the house or through the links, or of no known floor."""
    faults = []
    for module, _, tree in modules(package):
        here = floor(module)
        if here is None:
            faults.append(f"{module} stands on no floor")
            continue
        for line, name in imported(tree):
            first, _, rest = name.partition(".")
            where = f"{module}:{line} imports {name}"
            if name.startswith("."):
                faults.append(f"{where}: a relative import")
            elif first in LINKS:
                faults.append(f"{where}: through the link at the top")
            elif first == package.name:
                there = floor(rest)  # what is no module is a name of the package itself
                if (FLOOR_OF[""] if there is None else there) > here:
                    faults.append(f"{where}: up the house")
    return faults


def arrows(package: Path) -> dict[str, set[str]]:
    """What each module runs when it or one of its functions imports something.

    That is the module named, and the ``__init__`` of the folders that are entered on the way.
    """
    trees = {name.removesuffix("__init__").rstrip("."): tree for name, _, tree in modules(package)}
    found: dict[str, set[str]] = {name: set() for name in trees}
    for module, tree in trees.items():
        for _, name in imported(tree):
            parts = name.split(".")
            if parts[0] != package.name:
                continue
            steps = [".".join(parts[1:end]) for end in range(2, len(parts) + 1)]
            steps = [step for step in steps if step in trees]
            entered = [s for s in steps[:-1] if not f"{module}.".startswith(f"{s}.")]
            found[module] |= {*entered, *steps[-1:]} - {module}
    return found


def circles(package: Path) -> list[str]:
    """Groups of modules each of which imports all of its group, through others or itself."""
    graph = arrows(package)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        queue = [start]
        while queue:
            new = graph[queue.pop()] - seen
            seen |= new
            queue += new
        return seen

    behind = {module: reached(module) for module in graph}
    groups = {
        tuple(sorted(other for other in behind[module] if module in behind[other]))
        for module in graph
        if module in behind[module]
    }
    return sorted(", ".join(group) for group in groups)


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


RULES = (faulty_imports, circles, long_modules, shadowed_modules)


@pytest.mark.parametrize("faults", RULES)
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
        ("solvers/solve.py", "from manifold_sde.experiments.cli import main", "up the house"),
        ("loss.py", "from manifold_sde.problem import Problem", "up the house"),
        ("networks/module.py", "def f():\n    from manifold_sde.problem import P", "up the house"),
        ("symbolic/loss.py", "import manifold_sde.geometry.dense", "up the house"),
        ("noise/base.py", "from manifold_sde import Problem", "up the house"),
        (
            "noise/base.py",
            "if TYPE_CHECKING:\n    from manifold_sde import problem",
            "up the house",
        ),
        ("compile/compiler.py", "from manifold_sde.loss import Loss", "up the house"),
        ("bookkeeping.py", "import torch", "no floor"),
        ("problem.py", "from . import noise", "relative"),
        ("solvers/solve.py", "from ..noise import base", "relative"),
    ],
)
def test_broken_twin_faulty_imports(tmp_path: Path, file: str, line: str, fault: str) -> None:
    faults = faulty_imports(write_tree(tmp_path, {file: line}))
    assert len(faults) == 1
    assert fault in faults[0]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"a.py": "from manifold_sde import b\n", "b.py": "from manifold_sde.a import f\n"},
            "a, b",
        ),
        (
            {"a.py": "from manifold_sde.b import f", "b.py": "def f():\n    import manifold_sde.a"},
            "a, b",
        ),
        (
            {
                "a.py": "from manifold_sde.p.x import f",
                "p/__init__.py": "from manifold_sde.p.y import g",
                "p/x.py": "",
                "p/y.py": "from manifold_sde.a import h",
            },
            "a, p, p.y",
        ),
        ({"a.py": "from manifold_sde.b import a", "b.py": "import torch"}, None),
        (
            {
                "p/__init__.py": "from manifold_sde.p.x import f",
                "p/x.py": "from manifold_sde.p.y import g",
                "p/y.py": "",
            },
            None,
        ),
    ],
)
def test_broken_twin_circles(tmp_path: Path, files: dict[str, str], expected: str | None) -> None:
    assert circles(write_tree(tmp_path, files)) == ([] if expected is None else [expected])


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


@pytest.mark.parametrize(
    "name",
    [
        "manifold_sde",
        *(f"manifold_sde.{name}" for name in ("solvers", "networks", "problems", "training")),
        "manifold_sde.verification",
        *(f"manifold_sde.verification.{name}" for name in ("exact", "properties", "strategies")),
    ],
)
def test_what_a_package_shows_is_what_it_exports(name: str) -> None:
    package = importlib.import_module(name)
    assert dir(package) == sorted(package.__all__)
    assert all(hasattr(package, public) for public in package.__all__)
