"""Modules below the packages are linked from their package, and are not in the table of contents.

It stands beside each page: with all modules in it nobody finds anything there, and writing the site
takes twice as long.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx


def leave_out(app: Sphinx, doctree: nodes.document) -> None:
    """Take the modules of a package out of the contents; their pages say that they are orphans."""
    if app.env.docname.startswith("generated/") and app.env.docname != "generated/manifold_sde":
        for made in list(doctree.findall(addnodes.toctree)):
            made.parent.remove(made)


def setup(app: Sphinx) -> dict[str, Any]:
    """Have it done before the contents are collected."""
    app.connect("doctree-read", leave_out, priority=100)
    return {"version": "1", "parallel_read_safe": True}
