"""The directive ``schemes-table``: what every scheme declares of itself."""

from __future__ import annotations

from typing import Any, ClassVar

from docutils import nodes
from paper_table import reference, table
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from manifold_sde.solvers.adaptive import ADAPTIVE
from manifold_sde.solvers.schemes import SCHEMES, Scheme

HEADINGS = ("Method", "Form", "Weak order", "Strong order", "Adaptive", "Gradients a step")
WIDTHS = (16, 14, 10, 20, 10, 30)
FORMS = {"ito": "Itô", "stratonovich": "Stratonovich", None: "none needed"}


class SchemesTable(SphinxDirective):
    """A table with a row for every scheme."""

    has_content: ClassVar[bool] = False

    def run(self) -> list[nodes.Node]:
        """Build the table."""
        self.env.note_reread()
        return [table(HEADINGS, WIDTHS, [self._row(scheme) for scheme in SCHEMES.values()])]

    def _row(self, scheme: Scheme) -> tuple[nodes.Node, ...]:
        kind = type(scheme)
        link = reference(f"{kind.__module__}.{kind.__qualname__}", self.env.docname)
        link.children = [nodes.literal(text=f'"{scheme.name}"')]
        name = nodes.paragraph("", "", link)
        return (name, *(nodes.paragraph(text=cell) for cell in cells(scheme)))


def cells(scheme: Scheme) -> tuple[str, ...]:
    """What a row says besides the name."""
    strong = f"{scheme.strong_order:g}"
    if scheme.strong_order_commutative != scheme.strong_order:
        strong += f"; {scheme.strong_order_commutative:g} for noise that commutes"
    adaptive = "yes" if scheme.name in ADAPTIVE else "no"
    return FORMS[scheme.calculus], str(scheme.weak_order), strong, adaptive, scheme.cost


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("schemes-table", SchemesTable)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
