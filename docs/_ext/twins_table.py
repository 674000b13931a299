"""The directive ``twins-table``: every check, and what it rejects."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from marked_tests import marked_twins
from paper_table import table
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

TESTS = Path(__file__).parents[2] / "tests"
HEADINGS = ("Check", "What it rejects", "Shown by")
WIDTHS = (32, 40, 28)


class TwinsTable(SphinxDirective):
    """A table with a row for every check and what is broken."""

    has_content: ClassVar[bool] = False

    def run(self) -> list[nodes.Node]:
        """Build the table."""
        self.env.note_reread()
        rows = []
        for check, twins in sorted(marked_twins(TESTS).items()):
            name = check
            for broken, tests in sorted(twins.items()):
                shown = nodes.line_block()
                shown.extend(nodes.line("", "", nodes.literal(text=test)) for test in tests)
                rows.append((nodes.paragraph(text=name), nodes.paragraph(text=broken), shown))
                name = ""
        return [table(HEADINGS, WIDTHS, rows)]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("twins-table", TwinsTable)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
