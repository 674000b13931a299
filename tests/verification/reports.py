"""A report with a result of every sort, for the tests of what becomes of it."""

from __future__ import annotations

from manifold_sde.verification import Design, Picture, Report, Result, Series

DESIGN = Design("both laws are equal", 1e-4, "a clock off by a tenth", 0.01, 2000)
PICTURE = Picture(
    'Law of <the angle> & "more"',
    "angle (radians)",
    "density",
    (
        Series("exact", [0.0, 1.0, 2.0], [0.1, 0.5, 0.2]),
        Series("runs", [0.0, 1.0, 2.0], [0.12, 0.47, 0.22], "points", [0.02, 0.03, 0.02]),
        Series("", [0.0, 2.0], [0.1, 0.1], "dashed"),
        Series("counts", [0.0, 1.0, 2.0], [0.2, 0.4, 0.1], "steps"),
    ),
)
HOLDS = Result(
    "Euler's theorem",
    "holds",
    "largest defect 1.2e-16 at 32 points",
    1.2e-16,
    1e-12,
    statements=("Lemma 2.5",),
    seconds=0.3,
)
UNDECIDED = Result(
    "analytic",
    "undecided",
    "the loss is a torch function, of which SymPy cannot see the inside",
    statements=("Assumption 5.3",),
    kind="assumption",
    meaning="Losses that are composed of analytic functions are analytic; ReLU is not.",
)
FAILS = Result(
    "law of the direction <b>",
    "fails",
    "p = 2e-9 of the energy distance between 2000 runs and the exact law & more",
    5.5,
    1e-4,
    2e-9,
    ("Theorem 3.2", "Equation (8)"),
    "statistics",
    "The noise of your SGD is not that of the problem.",
    DESIGN,
    pictures=(PICTURE, PICTURE),
)


def report(*results: Result) -> Report:
    return Report("Problem('a toy <x>', dim=3)", results, effort="quick", seconds=12.3)
