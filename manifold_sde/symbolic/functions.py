"""Elementwise functions: which SymPy functions are known, and how torch computes them."""

from __future__ import annotations

import functools
from fractions import Fraction

import sympy

from manifold_sde.errors import SymbolicError

#: SymPy's name of an elementwise function, and how torch computes it. What is not here is
#: rewritten to it, or refused.
TORCH_FUNCTIONS = {
    "exp": "torch.exp({})",
    "log": "torch.log({})",
    "sin": "torch.sin({})",
    "cos": "torch.cos({})",
    "tan": "torch.tan({})",
    "asin": "torch.asin({})",
    "acos": "torch.acos({})",
    "atan": "torch.atan({})",
    "sinh": "torch.sinh({})",
    "cosh": "torch.cosh({})",
    "tanh": "torch.tanh({})",
    "asinh": "torch.asinh({})",
    "acosh": "torch.acosh({})",
    "atanh": "torch.atanh({})",
    "erf": "torch.erf({})",
    "erfc": "torch.erfc({})",
    "loggamma": "gamma.loggamma({})",
    "digamma": "gamma.digamma({})",
    "Abs": "torch.abs({})",
    "sign": "torch.sign({})",
}

#: Functions that are written in terms of the others before anything else.
_REWRITES = {
    "cot": lambda t: sympy.cos(t) / sympy.sin(t),
    "sec": lambda t: 1 / sympy.cos(t),
    "csc": lambda t: 1 / sympy.sin(t),
    "coth": lambda t: sympy.cosh(t) / sympy.sinh(t),
    "sech": lambda t: 1 / sympy.cosh(t),
    "csch": lambda t: 1 / sympy.sinh(t),
    "Heaviside": lambda t, *_: (1 + sympy.sign(t)) / 2,
}

_ALGEBRAIC = (sympy.Add, sympy.Mul, sympy.Pow, sympy.Max, sympy.Min)
#: ``exp`` that SymPy leaves alone: a**x would come back from exp(x*log(a)).
Exponential = sympy.Function("exp_")


def elementary(expression: sympy.Expr) -> sympy.Expr:
    """The expression with Max, Min, Heaviside, a**x and the like written by known functions.

    Raises:
        SymbolicError: If it holds a function that torch code cannot be generated for.
    """
    done: dict[sympy.Expr, sympy.Expr] = {}

    def rewrite(node: sympy.Expr) -> sympy.Expr:
        if node not in done:
            done[node] = rewrite_once(node)
        return done[node]

    def rewrite_once(node: sympy.Expr) -> sympy.Expr:
        if node.is_number or not node.args:
            return node
        name = type(node).__name__
        if not (isinstance(node, _ALGEBRAIC) or name in _REWRITES or function_name(node)):
            raise _unsupported(node)
        args = [rewrite(a) for a in node.args]
        if isinstance(node, sympy.Pow):
            base, exponent = args
            return base**exponent if exponent.is_number else Exponential(exponent * sympy.log(base))
        if isinstance(node, sympy.exp):
            return Exponential(args[0])
        if isinstance(node, (sympy.Add, sympy.Mul)):
            return node.func(*args)
        if isinstance(node, (sympy.Max, sympy.Min)):
            side = 1 if isinstance(node, sympy.Max) else -1
            return functools.reduce(lambda a, b: (a + b + side * sympy.Abs(a - b)) / 2, args)
        if name in _REWRITES:
            return rewrite(_REWRITES[name](*args))
        return node.func(*args)

    return rewrite(expression)


def function_name(node: sympy.Expr) -> str | None:
    """Name of a known elementwise function: a key of the table, or "polygamma k"."""
    name = type(node).__name__
    if name in ("exp", "exp_"):
        return "exp"
    if isinstance(node, sympy.polygamma) and node.args[0].is_Integer and node.args[0] >= 0:
        order = int(node.args[0])
        return f"polygamma {order}" if order else "digamma"
    return name if name in TORCH_FUNCTIONS and len(node.args) == 1 else None


def torch_call(name: str, argument: str) -> str:
    """Torch code of a known elementwise function."""
    if name == "polygamma 1":
        return f"gamma.trigamma({argument})"
    if name.startswith("polygamma"):
        return f"torch.polygamma({name.split()[1]}, {argument})"
    return TORCH_FUNCTIONS[name].format(argument)


def number(expression: sympy.Expr) -> float:
    """The float64 next to a number of SymPy's."""
    if expression.is_Rational:
        return int(expression.p) / int(expression.q)
    return float(expression.evalf(30))


def fraction(expression: sympy.Expr) -> Fraction:
    """A rational exponent; an irrational one as its float64."""
    if expression.is_Rational:
        return Fraction(int(expression.p), int(expression.q))
    return Fraction(number(expression))


def _unsupported(node: sympy.Expr) -> SymbolicError:
    return SymbolicError(
        f"no torch code can be generated for {type(node).__name__}",
        received=str(node),
        expected="sums, products, powers and " + ", ".join(TORCH_FUNCTIONS),
        remedy="write it with these functions (expression.rewrite may help), or give the loss as "
        "a torch function to Problem",
    )
