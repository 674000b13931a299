"""The directive ``exports``: what a package offers by name, each with its line and its page."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from docutils import nodes
from paper_table import reference, table
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Exports(SphinxDirective):
    """A table of the names in a package's ``__all__``; nothing for a package without one."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Build the table."""
        package = importlib.import_module(self.arguments[0])
        rows = []
        for name in getattr(package, "__all__", []):
            target = getattr(package, name)
            summary = (inspect.getdoc(target) or "").partition("\n\n")[0].replace("\n", " ")
            home = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', name)}"
            path = target.__name__ if inspect.ismodule(target) else home
            link = nodes.paragraph("", "", reference(path, self.env.docname))
            rows.append((link, nodes.paragraph(text=summary.replace("``", ""))))
        return [table(("Name", "What it is"), (30, 70), rows)] if rows else []


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("exports", Exports)
    return {"version": "1", "parallel_read_safe": True}
