"""The directive ``exports``: what a package offers by name, each with its line and its page."""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType
from typing import Any

from docutils import nodes
from linked_names import reference
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective


class Exports(SphinxDirective):
    """A table of the names in a package's ``__all__``; nothing for a package without one."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Build the table."""
        package = importlib.import_module(self.arguments[0])
        rows = []
        for name in getattr(package, "__all__", []):
            path, text = described(package, name)
            summary = text.partition("\n\n")[0].replace("\n", " ").replace("``", "")
            link = nodes.paragraph("", "", reference(path, self.env.docname))
            rows.append((link, nodes.paragraph(text=summary)))
        return [table(("Name", "What it is"), (38, 62), rows)] if rows else []


def table(headings: Any, widths: Any, rows: list[Any]) -> nodes.table:
    """A table of the rows, each a sequence of nodes."""
    made = nodes.table()
    group = nodes.tgroup(cols=len(headings))
    made += group
    group.extend(nodes.colspec(colwidth=width) for width in widths)
    head, body = nodes.thead(), nodes.tbody()
    head += _row([nodes.paragraph(text=heading) for heading in headings])
    body.extend(_row(cells) for cells in rows)
    group.extend([head, body])
    return made


def _row(cells: Any) -> nodes.row:
    row = nodes.row()
    row.extend(nodes.entry("", cell) for cell in cells)
    return row


def described(package: ModuleType, name: str) -> tuple[str, str]:
    """Full path and description of what a package exports by a name.

    A class, a function or a module knows both. A value has them in its module, in the comment
    ``#:`` before it.
    """
    target = getattr(package, name)
    text = inspect.getdoc(target) or ""
    if inspect.ismodule(target):
        return target.__name__, text
    if hasattr(target, "__qualname__"):
        # A decorator's inner function bears the name of what it decorates.
        own = target.__qualname__.rpartition("<locals>.")[2]
        return f"{target.__module__}.{own}", text
    for module in [key for key in sys.modules if key.startswith(package.__name__)]:
        comments = ModuleAnalyzer.for_module(module).find_attr_docs()
        if ("", name) in comments and getattr(sys.modules[module], name) is target:
            return f"{module}.{name}", "\n".join(comments["", name])
    raise ValueError(f"{package.__name__} exports {name}, which has no comment '#:'")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("exports", Exports)
    return {"version": "1", "parallel_read_safe": True}
