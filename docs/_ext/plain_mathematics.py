"""Docstrings as they are written here, made reStructuredText.

Mathematics is plain: ``|x|`` is a norm and ``(*s, n)`` a shape, where reStructuredText would read a
substitution and emphasis. They are escaped outside literals, roles, doctests and indented blocks.

Sections (``Args:``, ``Raises:``) are read by napoleon, with two differences. A colon in the first
line of an attribute ends no type, as types are annotated. And two names that share a description
(``a, b: The ends.``) get it each, where napoleon would take the first for the type of the second.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring

PROTECTED = re.compile(
    r"``.+?``"  # literals
    r"|:[\w:]+:`.+?`"  # roles, such as :math:
    r"|^ *>>>.*?(?=^ *$|\Z)"  # doctests
    r"|^(?P<indent> *)[^\n]*::[^\n]*\n(?:(?:(?P=indent) +[^\n]*)?(?:\n|\Z))+",  # blocks
    re.MULTILINE | re.DOTALL,
)
LONE_ASTERISK = re.compile(r"(?<![\w*\\])\*(?=\w)(?![^*\n]*\*)")
#: A field of several names, with the lines of its description.
SHARED = re.compile(r"^:(param|ivar) (\w+(?:, \w+)+):(.*\n(?:[ \t]+\S.*\n)*)", re.MULTILINE)


def each_name(text: str) -> str:
    r"""Give each of the names that share a description a field of its own.

    >>> print(each_name(":param a, b: The\n    ends.\n:param c: Other.\n"), end="")
    :param a: The
        ends.
    :param b: The
        ends.
    :param c: Other.
    """
    return SHARED.sub(
        lambda found: "".join(f":{found[1]} {name}:{found[3]}" for name in found[2].split(", ")),
        text,
    )


def escape(text: str) -> str:
    r"""Escape bars and lone asterisks in the unprotected parts of a docstring.

    >>> print(escape("The norm |x| of (*s, n), as ``|x|``; *emphasis* and :math:`|x|` stay."))
    The norm \|x\| of (\*s, n), as ``|x|``; *emphasis* and :math:`|x|` stay.
    """
    parts, end = [], 0
    for match in PROTECTED.finditer(text):
        parts += [_escape_plain(text[end : match.start()]), match[0]]
        end = match.end()
    return "".join((*parts, _escape_plain(text[end:])))


def _escape_plain(text: str) -> str:
    return LONE_ASTERISK.sub(r"\\*", re.sub(r"(?<!\\)\|", r"\\|", text))


def docstring_as_rst(text: str, name: str, what: str = "function", **known: Any) -> str:
    """A docstring as reStructuredText.

    Args:
        text: The docstring.
        name: The name of what it belongs to.
        what: What that is, in the words of autodoc.
        **known: What else napoleon is to know: ``config``, ``app``, ``obj``, ``options``.
    """
    what = "method" if what in {"attribute", "data", "property"} else what
    config = known.pop("config", None) or Config(napoleon_use_ivar=True)
    made = GoogleDocstring(text, config, what=what, name=name, **known).lines()
    return escape(each_name("\n".join([*made, ""])))


def setup(app: Sphinx) -> dict[str, Any]:
    """Process every docstring in place of napoleon."""
    app.setup_extension("sphinx.ext.napoleon")

    def process(
        _app: Sphinx, what: str, name: str, object_: object, options: Any, lines: list[str]
    ) -> None:
        known = {"config": app.config, "app": app, "obj": object_, "options": options}
        lines[:] = docstring_as_rst("\n".join(lines), name, what, **known).split("\n")

    app.connect("autodoc-process-docstring", process)
    return {"version": "1", "parallel_read_safe": True}
