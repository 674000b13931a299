"""Docstrings here write mathematics plainly: ``|x|`` is a norm and ``(*s, n)`` a shape.

reStructuredText would read the bar as a substitution and the asterisk as emphasis. This extension
escapes them outside literals, roles, doctests and indented blocks.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

PROTECTED = re.compile(
    r"``.+?``"  # literals
    r"|:[\w:]+:`.+?`"  # roles, such as :math:
    r"|^ *>>>.*?(?=^ *$|\Z)"  # doctests
    r"|^(?P<indent> *)[^\n]*::[^\n]*\n(?:(?:(?P=indent) +[^\n]*)?(?:\n|\Z))+",  # blocks
    re.MULTILINE | re.DOTALL,
)
LONE_ASTERISK = re.compile(r"(?<![\w*\\])\*(?=\w)(?![^*\n]*\*)")


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


def setup(app: Sphinx) -> dict[str, Any]:
    """Process every docstring, after napoleon has."""

    def process(
        _app: Sphinx, _what: str, _name: str, _object: object, _options: object, lines: list[str]
    ) -> None:
        lines[:] = escape("\n".join(lines)).split("\n")

    app.connect("autodoc-process-docstring", process, priority=900)
    return {"version": "1", "parallel_read_safe": True}
