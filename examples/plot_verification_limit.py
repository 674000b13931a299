r"""
What stands behind a verdict
============================

The checks of the limit theorems compare SGD with its limit, and each comes with the picture that it
judged. Here three of them are drawn for a sound problem, and for one whose SGD has a fault: its
noise is a tenth larger than the problem says.
"""

# %%
# A check takes a subject, which is a problem with the code that answers for it. Any part of it can
# be replaced; the fault here is in SGD.

import dataclasses
import os

import matplotlib.pyplot as plt

from manifold_sde import SphericalNoise, problems
from manifold_sde.solvers import run_sgd
from manifold_sde.verification import Effort, Subject, plot_picture
from manifold_sde.verification.limit_theorems import CHECKS

quick = "MANIFOLD_SDE_QUICK" in os.environ
effort = Effort(
    "example", points=8, departure=0.25, runs=256 if quick else 1024, steps=256, step_size=0.05
)
problem = problems.great_sphere(noise_scale=0.3)
louder = problem.with_noise(SphericalNoise(0.33))


def run_louder(problem, *arguments, **options):
    return run_sgd(louder, *arguments, **options)


sound = Subject.of(problem)
faulty = dataclasses.replace(sound, run_sgd=run_louder)

# %%
# The names of the checks are those of their results.

shown = {
    "Z of (7) tends to a Brownian motion": "integrators of (7)",
    "SGD at a fixed ratio tends to (8)": "SGD at a fixed ratio tends to (8)",
    "norm of SGD's weights": "norm of SGD's weights",
}
checks = {check.name: check for check in CHECKS}


def results(subject):
    made = {name: checks[name](subject, effort) for name in dict.fromkeys(shown.values())}
    return [next(r for r in made[check] if r.name == name) for name, check in shown.items()]


figure, rows = plt.subplots(2, 3, figsize=(12.0, 6.6), layout="constrained")
for axes, subject, label in zip(rows, (sound, faulty), ("sound", "noise times 1.1"), strict=True):
    for ax, result in zip(axes, results(subject), strict=True):
        plot_picture(result.pictures[0], ax)
        ax.set_title(f"{result.name}\n{label}: {result.verdict}", fontsize="medium")
        ax.spines[["top", "right"]].set_visible(False)
        print(f"{label}: {result.verdict}: {result.name}")
plt.show()

# %%
# Z is steeper than the normal law, the directions move too fast, and the norm stays above (10): the
# fault is found three times. Each detail says how large a fault the check is sure to find.

print(results(faulty)[1].detail)
