"""The directive ``paper-table``: the paper's statements, their code and their tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from marked_tests import marked_tests
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from manifold_sde.paper import STATEMENTS, implementations

TESTS = Path(__file__).parents[2] / "tests"
HEADINGS = ("Statement", "What it says", "Code", "Tests")
WIDTHS = (14, 36, 25, 25)


class PaperTable(SphinxDirective):
    """A table with a row for every statement; what is missing shows as a dash."""

    has_content: ClassVar[bool] = False

    def run(self) -> list[nodes.Node]:
        """Build the table, and one line that counts its rows."""
        self.env.note_reread()
        code = implementations()
        tests = marked_tests(TESTS)
        rows = [
            (
                _text(f"{name} (§{statement.section})"),
                _text(statement.summary),
                _lines([reference(target, self.env.docname) for target in code[name]]),
                _lines([nodes.literal(text=test) for test in tests.get(name, [])]),
            )
            for name, statement in STATEMENTS.items()
        ]
        with_code = sum(bool(code[name]) for name in STATEMENTS)
        with_tests = sum(bool(tests.get(name)) for name in STATEMENTS)
        count = f"{with_code} of {len(rows)} rows have code, {with_tests} have a test."
        return [nodes.paragraph(text=count), table(HEADINGS, WIDTHS, rows)]


def _text(text: str) -> nodes.paragraph:
    return nodes.paragraph(text=text)


def _lines(parts: list[Any]) -> nodes.Node:
    if not parts:
        return nodes.paragraph(text="—")
    block = nodes.line_block()
    block.extend(nodes.line("", "", part) for part in parts)
    return block


def reference(target: str, docname: str) -> nodes.Node:
    """A link to the object's place in the API pages, by its short name; warns if there is none."""
    parts = target.split(".")
    start = next((i for i, part in enumerate(parts) if part[:1].isupper()), len(parts) - 1)
    link = addnodes.pending_xref(
        "", refdomain="py", reftype="obj", reftarget=target, refdoc=docname, refwarn=True
    )
    link += nodes.literal(text=".".join(parts[start:]))
    return link


def table(headings: Any, widths: Any, rows: list[Any]) -> nodes.table:
    """A table of the rows, each a sequence of nodes."""
    made = nodes.table(classes=["paper-table"])
    group = nodes.tgroup(cols=len(headings))
    made += group
    group.extend(nodes.colspec(colwidth=width) for width in widths)
    head, body = nodes.thead(), nodes.tbody()
    head += _row([_text(heading) for heading in headings])
    body.extend(_row(cells) for cells in rows)
    group.extend([head, body])
    return made


def _row(cells: Any) -> nodes.row:
    row = nodes.row()
    row.extend(nodes.entry("", cell) for cell in cells)
    return row


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("paper-table", PaperTable)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
