"""Tables of the documentation that are made of the code, as Markdown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs" / "_ext"))

from marked_tests import marked_tests, marked_twins  # noqa: E402

from manifold_sde.paper import STATEMENTS, implementations  # noqa: E402
from manifold_sde.solvers.adaptive import ADAPTIVE  # noqa: E402
from manifold_sde.solvers.schemes import SCHEMES, Scheme  # noqa: E402

_FORMS = {"ito": "Itô", "stratonovich": "Stratonovich", None: "none needed"}


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell or "—" for cell in line) + " |" for line in lines)


def _code(names: Iterable[str]) -> str:
    return "<br>".join(f"`{name}`" for name in names)


def _text(text: str) -> str:
    for sign in "|*_":
        text = text.replace(sign, "\\" + sign)
    return text


def paper() -> str:
    """A row for every statement of the paper: its code and its tests; a dash is an empty cell."""
    code, tests = implementations(), marked_tests(ROOT / "tests")
    rows = [
        (
            _text(f"{name} (§{statement.section})"),
            _text(statement.summary),
            _code(code[name]),
            _code(tests.get(name, [])),
        )
        for name, statement in STATEMENTS.items()
    ]
    counts = sum(bool(code[name]) for name in STATEMENTS), sum(bool(row[3]) for row in rows)
    line = f"{counts[0]} of {len(rows)} rows have code, {counts[1]} have a test.\n\n"
    return line + markdown_table(("Statement", "What it says", "Code", "Tests"), rows)


def schemes() -> str:
    """A row for every scheme: what it declares of itself."""
    headings = ("Method", "Form", "Weak order", "Strong order", "Adaptive", "Gradients a step")
    return markdown_table(headings, map(_scheme, SCHEMES.values()))


def _scheme(scheme: Scheme) -> tuple[str, ...]:
    strong = f"{scheme.strong_order:g}"
    if scheme.strong_order_commutative != scheme.strong_order:
        strong += f"; {scheme.strong_order_commutative:g} for noise that commutes"
    return (
        f'`"{scheme.name}"`',
        _FORMS[scheme.calculus],
        str(scheme.weak_order),
        strong,
        "yes" if scheme.name in ADAPTIVE else "no",
        _text(scheme.cost),
    )


def twins() -> str:
    """A row for every check and what is broken: the tests that show that it is rejected."""
    rows = []
    for check, found in sorted(marked_twins(ROOT / "tests").items()):
        name = _text(check)
        for broken, tests in sorted(found.items()):
            rows.append((name, _text(broken), _code(tests)))
            name = " "
    return markdown_table(("Check", "What it rejects", "Shown by"), rows)


#: The tables by the names that pages give them.
TABLES: dict[str, Callable[[], str]] = {"paper": paper, "schemes": schemes, "twins": twins}
