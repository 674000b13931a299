"""Names of the package, written out in full, become links to their places in the API.

So a page reads well as Markdown, too, where it has the full names and no links. It is done in all
tables, and in the text of pages in Markdown, where names of modules stay what they are.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from pydoc import locate
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

_NAME = re.compile(r"manifold_sde(\.\w+)+")


class LinkedNames(SphinxTransform):
    """Turns literals ``manifold_sde...`` into links; warns where one leads nowhere."""

    default_priority = 500

    def apply(self, **_: Any) -> None:
        """Replace them."""
        places: list[nodes.Element] = list(self.document.findall(nodes.table))
        if Path(self.env.doc2path(self.env.docname)).suffix == ".md":
            places.append(self.document)
        for place in places:
            for literal in list(place.findall(nodes.literal)):
                name = literal.astext()
                in_table = isinstance(place, nodes.table)
                if _NAME.fullmatch(name) and (in_table or not inspect.ismodule(locate(name))):
                    literal.replace_self(reference(home_of(name), self.env.docname))


def home_of(name: str) -> str:
    """The name of an object where it is defined, under which the API has it."""
    found = locate(name)
    own = getattr(found, "__qualname__", None)
    return name if own is None else f"{found.__module__}.{own}"


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
