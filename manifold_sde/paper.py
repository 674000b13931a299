"""The paper in code: which statement of the paper is implemented where.

The paper is Li, Wang and Yu, "Fast Mixing of Stochastic Gradient Descent with Normalization and
Weight Decay" (NeurIPS 2022). :data:`STATEMENTS` names everything in its main text that has a
number. Code says what it implements with :func:`implements`; a test says what it checks with
``@pytest.mark.paper("Lemma 2.7")``. The table in the documentation is made from the two.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from manifold_sde.errors import ArgumentError, MissingDependencyError

__all__ = ["STATEMENTS", "Statement", "implementations", "implements"]

T = TypeVar("T")


@dataclass(frozen=True)
class Statement:
    """A numbered statement, equation or figure of the paper.

    Attributes:
        section: The section of the paper that it stands in, such as ``"2.1"``.
        summary: What it says, in one line.
    """

    section: str
    summary: str


_ROWS = """
Figure 1       | 1   | Accuracy and norm plateau early, yet the accuracy after decay keeps improving
Equation (1)   | 1   | SGD with weight decay: one sample's gradient a step
Equation (2)   | 1.1 | The same step, split into full gradient and gradient noise σ
Equation (3)   | 1.1 | The canonical Itô SDE approximation of SGD with weight decay
Conjecture 1.1 | 1.1 | Fast equilibrium: the network function mixes in Õ(1/(ηλ)) time
Theorem 1.2    | 1.1 | Informal main theorem: SGD and its SDE share a limit law, which mixes
Assumption 2.1 | 2   | C⁴ losses; Γ a manifold of local minimisers; the Hessian has rank M on Γ
Definition 2.2 | 2   | Homogeneous functions; scale-invariant means 0-homogeneous
Assumption 2.3 | 2   | Every sample loss is scale-invariant and Γ is a cone
Lemma 2.4      | 2   | The l-th derivative of a k-homogeneous function is (k − l)-homogeneous
Lemma 2.5      | 2   | Euler: ⟨x, ∇f(x)⟩ = k f(x); zero for scale-invariant f
Definition 2.6 | 2   | Gradient flow and its limit map Φ
Lemma 2.7      | 2   | The attraction set U is a cone and Φ is 1-homogeneous on it
Lemma 2.8      | 2   | On Γ, ∂Φ is the orthogonal projection onto the tangent space; ∂Φ(x) x = x
Definition 2.9 | 2.1 | The uniform metric between functions of time
Equation (4)   | 2.1 | A Katzenberger process: noise, slow drift and fast gradient flow
Theorem 2.10   | 2.1 | A Katzenberger process converges in law to the diffusion (5) on Γ
Equation (5)   | 2.1 | The limiting diffusion of a Katzenberger process, in integral form
Equation (6)   | 3   | SGD with weight decay as a Katzenberger process, λ/η fixed
Equation (7)   | 3   | The integrators A, B, Z of (6)
Lemma 3.1      | 3   | The integrators (7) converge: A without bound, B to Ct, Z to Brownian motion
Theorem 3.2    | 3   | SGD at λ/η = C converges to (8); Y_C is Y_0 with time and norm changed
Equation (8)   | 3   | The limiting diffusion Y_C at a fixed ratio λ/η = C
Remark 3.3     | 3   | Without weight decay the same diffusion, exponentially slower
Equation (9)   | 4   | The rescaled step: learning rate and weight decay both √(ηλ)
Equation (10)  | 4   | The norm in closed form where tr Σ is constant on the unit sphere
Equation (11)  | 4.1 | The radius R: the norm that weight decay leads to from norm 1
Equation (12)  | 4.1 | The time scale τ from steps to diffusion time, and its inverse
Equation (13)  | 4.1 | The limiting diffusion Y of the general case
Theorem 4.1    | 4.1 | The SDE (3), divided by R in the time τ, converges to (13)
Remark 4.2     | 4.1 | The condition η < 2λ can be η < 2Cλ for any C
Equation (14)  | 4.2 | Rescaled SGD as a Katzenberger process
Equation (15)  | 4.2 | The integrator A of (14), of the gradient
Equation (16)  | 4.2 | The integrator B of (14), of the weight decay
Equation (17)  | 4.2 | The integrator Z of (14), of the noise
Lemma 4.3      | 4.2 | The integrators (15) to (17) converge: A without bound, B to t/2, Z to noise
Theorem 4.4    | 4.2 | SGD with weight decay, divided by R in the time τ, converges to (13)
Assumption 5.1 | 5   | Γ₁, the unit-norm minimisers, is compact and connected
Assumption 5.2 | 5   | Controllability: the projected noise spans the tangent space of Γ ∩ sphere
Assumption 5.3 | 5   | tr Σ and Γ are analytic
Theorem 5.4    | 5   | The direction of (13) converges in total variation to a unique law π on Γ₁
Theorem 5.5    | 5   | Fast mixing: SGD and its SDE reach one law at τ⁻¹(T), and π as T grows
Figure 2       | 6.1 | Directions of the normalised linear model follow the time scale (12)
Equation (18)  | 6.1 | The SGD step of the normalised linear model, with spherical Gaussian noise
Equation (19)  | 6.1 | The SDE approximation of (18)
Remark 6.1     | 6.1 | The main theorem also holds for the Gaussian noise of (18)
Figure 3       | 6.2 | Test accuracy of Φ(x_t) for PreResNet on CIFAR-10, beside Figure 1
"""


def _parse(rows: str) -> Iterator[tuple[str, Statement]]:
    for row in rows.strip().splitlines():
        name, section, summary = (part.strip() for part in row.split("|", 2))
        yield name, Statement(section, summary)


STATEMENTS: Mapping[str, Statement] = MappingProxyType(dict(_parse(_ROWS)))
"""Every numbered statement, equation and figure of the paper's main text, in its order."""

_implementers: dict[str, set[str]] = {name: set() for name in STATEMENTS}


def implements(*names: str) -> Callable[[T], T]:
    """Record that a function, method or class implements statements of the paper.

    The object itself is returned, unchanged. On a property, class method or static method this
    decorator stands below the other one.

    Args:
        *names: Keys of :data:`STATEMENTS`.

    Returns:
        The decorator.

    Raises:
        ArgumentError: A name is not in the paper, none is given, or what is decorated has no
            name of its own.

    Example:
        >>> @implements("Lemma 2.5")
        ... def radial_part(x, gradient):
        ...     return x @ gradient
        >>> implements("Lemma 2.50")
        Traceback (most recent call last):
            ...
        manifold_sde.errors.ArgumentError: The paper has no such statement.
          received: 'Lemma 2.50'
          expected: a key of manifold_sde.paper.STATEMENTS
          hint:     did you mean 'Lemma 2.5', 'Lemma 2.8' or 'Lemma 2.7'?
    """
    if not names:
        raise ArgumentError(
            "implements needs the names of the statements.",
            received="no name",
            expected="keys of manifold_sde.paper.STATEMENTS",
            remedy='write, for example, @implements("Lemma 2.7")',
        )
    for name in names:
        if name not in STATEMENTS:
            raise _unknown(name)

    def record(implementer: T) -> T:
        qualified = getattr(implementer, "__qualname__", None)
        if qualified is None:
            raise ArgumentError(
                "implements needs a function or a class.",
                received=repr(implementer),
                expected="an object with __qualname__",
                remedy="place @implements below @property and the like",
            )
        for name in names:
            _implementers[name].add(f"{implementer.__module__}.{qualified}")
        return implementer

    return record


def implementations() -> dict[str, list[str]]:
    """Import the whole package and list, for each statement, what implements it.

    Modules whose optional dependencies are missing are left out.

    Returns:
        For every key of :data:`STATEMENTS`, in the paper's order, the qualified names in
        alphabetical order; an empty list where nothing implements the statement.
    """
    _import_package()
    package = __name__.partition(".")[0] + "."
    return {
        name: sorted(found for found in _implementers[name] if found.startswith(package))
        for name in STATEMENTS
    }


def _import_package() -> None:
    package = sys.modules["manifold_sde"]  # which is there before any of its modules
    for module in pkgutil.walk_packages(package.__path__, "manifold_sde."):
        if module.name.endswith(".__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except MissingDependencyError:
            continue
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == "manifold_sde":
                raise


def _unknown(name: str) -> ArgumentError:
    wanted = f"Equation {name}" if name.startswith("(") else name
    close = difflib.get_close_matches(wanted, STATEMENTS)
    *first, last = [repr(match) for match in close] or [""]
    guesses = f"{', '.join(first)} or {last}" if first else last
    return ArgumentError(
        "The paper has no such statement.",
        received=repr(name),
        expected="a key of manifold_sde.paper.STATEMENTS",
        remedy=f"did you mean {guesses}?" if close else "see manifold_sde.paper.STATEMENTS",
    )
