"""Results agree with those recorded before the package was rebuilt."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from manifold_sde.solvers import halving
from tests.recorded import COMPILED, FILE, PROBLEMS, results, verdicts

#: What results may differ by, relative to their size.
AGREE = 1e-9


@cache
def recorded() -> dict[str, np.ndarray]:
    with np.load(FILE) as file:
        return dict(file)


#: The results of a problem, which two tests ask for.
found_results = cache(results)


def differences(problem: str, label: str, *, compile: bool = False) -> list[str]:
    """The results of a problem that differ from what was recorded."""
    found = found_results(problem, compile=compile)
    wanted = {
        name.partition("/")[2]: value
        for name, value in recorded().items()
        if name.startswith(f"{label}/") and not name.endswith("/verdicts")
    }
    assert found.keys() == wanted.keys()
    faults = []
    for name, value in wanted.items():
        own = found[name].detach().numpy()
        if own.shape != value.shape or (np.isnan(own) != np.isnan(value)).any():
            faults.append(f"{name}: another shape, or other paths lost")
            continue
        apart = np.nanmax(np.abs(own - value), initial=0.0)
        if apart > AGREE * np.nanmax(np.abs(value), initial=1e-3):
            faults.append(f"{name}: {apart:.2g} apart")
    return faults


#: Those that take longest, of routes that others of them take as well.
LONG = ("network", "mixed noise", "label noise")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "problem",
    [pytest.param(p, marks=[pytest.mark.thorough] if p in LONG else []) for p in PROBLEMS],
)
def test_results_are_those_recorded(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Paths that were lost when these were recorded are led home now.
    monkeypatch.setattr(halving, "MOST_HALVINGS", 0)
    assert differences(problem, problem) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("problem", COMPILED)
def test_results_of_compiled_code_are_those_recorded(problem: str) -> None:
    assert differences(problem, f"{problem}, compiled", compile=True) == []


@pytest.mark.filterwarnings("ignore")
def test_another_problem_is_told_apart() -> None:
    assert len(differences("varying circle", "great circle")) > 10


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("problem", ["great circle", "mixed noise", "linear model"])
def test_verdicts_are_those_recorded(problem: str) -> None:
    """Check by check; what the budget of one of the two runs did not reach is undecided there."""
    found, wanted = (
        dict(line.rsplit(": ", 1) for line in lines)
        for lines in (verdicts(problem), recorded()[f"{problem}/verdicts"].tolist())
    )
    assert found.keys() == wanted.keys()
    decided = [
        name for name, verdict in wanted.items() if "undecided" not in (verdict, found[name])
    ]
    assert len(decided) > 25
    assert {name: found[name] for name in decided} == {name: wanted[name] for name in decided}
