r"""
One simulation answers for all
==============================

The direction of the weights, in the intrinsic clock :math:`u = \int \|Y\|^{-4}\,dt`, is a diffusion
that knows no learning rate, no weight decay and no norm. It is simulated once, and then asked: for
the law at several ratios of weight decay to learning rate, for SGD under a schedule that it has
never seen, and for the equilibrium. The problem is a circle whose sampling noise varies along it,
small enough for the exact law to be known.
"""

# %%
# Simulate the direction once. Nothing is said of a learning rate here.

import os
import warnings

import matplotlib.pyplot as plt
import numpy as np
import torch

from manifold_sde import DirectionDiffusion, Geometry, problems
from manifold_sde.errors import NotMixedWarning
from manifold_sde.solvers import run_sgd, solve
from manifold_sde.verification.exact import CircleDiffusion

quick = "MANIFOLD_SDE_QUICK" in os.environ
if quick:  # too short for the equilibrium, which is told
    warnings.simplefilter("ignore", NotMixedWarning)
points = {"marker": "o", "lw": 0, "elinewidth": 1, "ms": 4}
n_paths, n_sgd, horizon, dt = (64, 64, 12.0, 2.0) if quick else (2000, 2000, 320.0, 0.5)

problem = problems.mixed_noise_circle()
circle, law = problem.facts.circle, CircleDiffusion.of(problem)
clocks = np.linspace(0.0, horizon, 7 if quick else 81)
paths = solve(DirectionDiffusion(problem), problem.minimizer, clocks, n_paths=n_paths, dt=dt)

# %%
# Ask for the mean of :math:`\cos\theta` at three ratios :math:`C = \lambda/\eta`, each in its own
# time; the paths are stepped again to the moments asked for, never interpolated.


def cosine(y):
    return torch.cos(circle.angle(y))


figure, ax = plt.subplots(figsize=(6.0, 3.6), layout="constrained")
for ratio, marker in ((0.1, "o"), (1.0, "s"), (10.0, "^")):
    last = np.log1p(4 * ratio * (3.0 if quick else 60.0)) / (4 * ratio)
    times = np.geomspace(last / 30, last, 2 if quick else 8)
    mean, error = paths.at(ratio=ratio, times=times).expectation(cosine)
    drawn = ax.errorbar(times, mean, 2 * error, **{**points, "marker": marker})
    fine = np.geomspace(last / 30, last, 3 if quick else 40)
    exact = [law.at(t, ratio=ratio).angle.expectation(np.cos) for t in fine]
    ax.plot(fine, exact, color=drawn[0].get_color(), lw=1, label=f"$C = {ratio:g}$")
ax.set(xscale="log", xlabel="time $t = \\eta^2 k$ of (8)", ylabel="mean of $\\cos\\theta$")
ax.legend(title="points: from one run")
plt.show()

# %%
# Now SGD itself, with a learning rate that is cut to a quarter half-way. ``at_steps`` predicts its
# law from the same run; no other simulation is needed. SGD is compared by :math:`\Phi(x)`.


def rate(step):
    return 0.04 if step < 400 else 0.01


steps = [0, 200, 400, 800] if quick else [0, 100, 200, 300, 400, 600, 800, 1200]
mean, error = paths.at_steps(rate, 0.05, steps).expectation(cosine)
weights = run_sgd(problem, problem.minimizer, rate, 0.05, steps, n_paths=n_sgd, seed=1)
values = cosine(Geometry(problem).limit_map(weights.ys))
figure, ax = plt.subplots(figsize=(6.0, 3.6), layout="constrained")
ax.errorbar(steps, mean, 2 * error, color="black", lw=1, capsize=3, label="diffusion")
ax.errorbar(steps, values.mean(1), 2 * values.std(1) / n_sgd**0.5, **points, label="SGD")
ax.axvline(400, color="0.8", zorder=0)
ax.set(xlabel="step $k$: $\\eta = 0.04$, then $0.01$", ylabel="mean of $\\cos\\theta$")
ax.legend()
plt.show()

# %%
# The equilibrium of SGD counts steps. The direction's own equilibrium, in the clock, is another
# law: where the noise is strong the norm is large, and SGD takes longer there. ``equilibrium``
# weighs for that. It leaves out the first half of the run, which has to be several relaxation times
# long: here six.

print(f"relaxation time {law.relaxation_time:.1f}, burn-in {horizon / 2:.0f}")
angles = np.linspace(-np.pi, np.pi, 200)
figure, ax = plt.subplots(figsize=(6.0, 3.6), layout="constrained")
ax.plot(angles, law.equilibrium.density(angles), "k", lw=1, label="exact, in steps")
ax.plot(angles, law.equilibrium_in_clock.density(angles), "k:", lw=1, label="exact, in the clock")
edges = np.linspace(-np.pi, np.pi, 13)


def bins(y):
    inside = np.digitize(circle.angle(y).numpy(), edges[1:-1])
    return torch.nn.functional.one_hot(torch.from_numpy(inside), len(edges) - 1).double()


found, width = paths.equilibrium(bins), edges[1] - edges[0]
mean, error = found.mean / width, found.standard_error / width
ax.errorbar(edges[:-1] + width / 2, mean, 2 * error, **points, label="weighted run")
ax.set(xlabel="angle $\\theta$", ylabel="density", title="Equilibrium", ylim=(0, None))
ax.legend()
plt.show()
