r"""Mathematics as MathML, which browsers draw themselves: no script, no network.

The converter is that of docutils. Before it sees a formula, arguments without braces get them
(``\tfrac12``), and a tag becomes a number at the end.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

_LOGGER = logging.getLogger(__name__)
#: Commands and the number of their arguments.
_ARGUMENTS = {"frac": 2, "dfrac": 2, "tfrac": 2, "bar": 1, "hat": 1, "tilde": 1, "overline": 1}
_NAMES = {"bar": "overline", "dots": "ldots"}
_COMMAND = re.compile(rf"\\({'|'.join([*_ARGUMENTS, *_NAMES])})(?![a-zA-Z])")
_TOKEN = re.compile(r"\s*(\\[a-zA-Z]+|\\.|[^\s{}])", re.DOTALL)
_TAG = re.compile(r"\\tag\{([^}]*)\}")


def prepared(tex: str) -> str:
    r"""A formula in the dialect of the converter.

    >>> print(prepared(r"\tfrac12 x + \frac{a}b"), prepared(r"\bar Y_C = b \tag{3}"))
    {\tfrac{1}{2}} x + {\frac{a}{b}} {\overline{Y}{}}_C = b \qquad (3)
    """
    parts, rest = [], _TAG.sub(r"\\qquad (\1)", tex.strip())
    while found := _COMMAND.search(rest):
        name = found[1]
        parts.append(rest[: found.start()])
        rest = rest[found.end() :]
        made = "\\" + _NAMES.get(name, name)
        for _ in range(_ARGUMENTS.get(name, 0)):
            argument, rest = _argument(rest)
            made += f"{{{prepared(argument)}}}"
        if name in _ARGUMENTS:  # a group; of an accent alone, its index would go below
            made = f"{{{made}{'{}' * (_ARGUMENTS[name] == 1)}}}"
        parts.append(made)
    return "".join([*parts, rest])


def _argument(tex: str) -> tuple[str, str]:
    """The argument with which a text begins, without its braces, and what follows."""
    text = tex.lstrip()
    if text.startswith("{"):
        depth = 0
        for end, sign in enumerate(text):
            depth += (sign == "{") - (sign == "}")
            if not depth:
                return text[1:end], text[end + 1 :]
    token = _TOKEN.match(text)
    return (token[1], text[token.end() :]) if token else ("", text)


def mathml(tex: str, *, block: bool = False) -> str:
    r"""A formula as MathML.

    Raises:
        MathError: If the converter does not know it.

    >>> mathml(r"\sqrt{2}").startswith("<math")
    True
    """
    made: str = tex2mathml(prepared(tex), as_block=block)
    return made


def _visit(translator: Any, node: Any, *, block: bool) -> None:
    try:
        made = mathml(node.astext(), block=block)
    except MathError as error:
        _LOGGER.warning("formula %r: %s", node.astext(), error, location=node)
        made = translator.encode(node.astext())
    kind = "div" if block else "span"
    translator.body.append(f'<{kind} class="formula">{made}</{kind}>')
    raise nodes.SkipNode


def visit_math(translator: Any, node: nodes.math) -> None:
    """Write a formula of a line."""
    _visit(translator, node, block=False)


def visit_math_block(translator: Any, node: nodes.math_block) -> None:
    """Write a formula of its own."""
    _visit(translator, node, block=True)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer."""
    app.add_html_math_renderer("native", (visit_math, None), (visit_math_block, None))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
