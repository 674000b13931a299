"""Names of the package in tables, written out in full, become links to their places in the API.

So a table reads well as Markdown, too, where it has the full names and no links.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform


class LinkedNames(SphinxTransform):
    """Turns literals ``manifold_sde...`` in tables into links; warns where one leads nowhere."""

    default_priority = 500

    def apply(self, **_: Any) -> None:
        """Replace them."""
        for made in list(self.document.findall(nodes.table)):
            for literal in list(made.findall(nodes.literal)):
                if literal.astext().startswith("manifold_sde."):
                    literal.replace_self(reference(literal.astext(), self.env.docname))


def reference(target: str, docname: str) -> nodes.Node:
    """A link to the object's place in the API pages, by its short name; warns if there is none."""
    parts = target.split(".")
    start = next((i for i, part in enumerate(parts) if part[:1].isupper()), len(parts) - 1)
    link = addnodes.pending_xref(
        "", refdomain="py", reftype="obj", reftarget=target, refdoc=docname, refwarn=True
    )
    link += nodes.literal(text=".".join(parts[start:]))
    return link


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the transform."""
    app.add_transform(LinkedNames)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
