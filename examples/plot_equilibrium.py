r"""
The law that every start comes to
=================================

The direction of the weights forgets where it started: Theorem 5.4. Here are runs of the limiting
diffusion from three starts on ``problems.mixed_noise_circle``, whose noise varies along the circle
of minimisers, and the law :math:`\pi` that they come to. It is the equilibrium in time, that is in
steps of SGD; the equilibrium of the intrinsic clock is another one.
"""

# %%
# Three starts, a third of a turn apart, and the exact law at each time. The relaxation time of the
# pair of direction and norm is that of the slowest mode of its generator.

import os
import warnings

import matplotlib.pyplot as plt
import numpy as np
import torch

from manifold_sde import DirectionDiffusion, LimitingDiffusion, problems
from manifold_sde.errors import NotMixedWarning
from manifold_sde.solvers import solve
from manifold_sde.verification import exact
from manifold_sde.verification.sampling import farthest
from manifold_sde.verification.two_sample import total_variation

quick = "MANIFOLD_SDE_QUICK" in os.environ
if quick:  # too short for the equilibrium, which is told
    warnings.simplefilter("ignore", NotMixedWarning)
n_paths, n_chains, step = (60, 40, 4.0) if quick else (1500, 400, 1.0)

problem = problems.mixed_noise_circle()
circle, law = problem.facts.circle, exact.law_of(problem)
time = 1.0 / law.spectral_gap_in_time()
print(f"relaxation time: T = {time:.2f}, in the clock u = {law.relaxation_time:.1f}")

angles = torch.tensor([0.0, 2.0, -2.0], dtype=torch.float64)
norm = 0.07**0.25  # near its equilibrium
starts = norm * circle.point(angles).repeat_interleave(n_paths, 0)
times = np.linspace(0.0, (0.5 if quick else 4.0) * time, 3 if quick else 9)
runs = solve(LimitingDiffusion(problem), starts, times, dt=step * 0.05, seed=1)

# %%
# The distance of the law of each start from :math:`\pi`, on 16 cells of the circle: one half of the
# runs chooses the cells in which it has more mass, the other half is counted. The lines are the
# exact distances, on the whole circle.

grid = np.linspace(-np.pi, np.pi, 20_001)
uniform = np.random.default_rng(0).uniform(size=50_000)
from_pi = circle.point(torch.from_numpy(np.interp(uniform, law.equilibrium.cdf(grid), grid)))
centers = farthest(circle.point(torch.linspace(-3.1, 3.1, 400, dtype=torch.float64)), 16).numpy()

_, left = plt.subplots(figsize=(6.0, 3.6), layout="constrained")
colours = ["#0072B2", "#D55E00", "#009E73"]
fine = np.linspace(0.2 * time, times[-1], 2 if quick else 14)
for i, angle in enumerate(angles.tolist()):
    states = runs.directions[:, i * n_paths : (i + 1) * n_paths].numpy()
    found = np.array([total_variation(y, from_pi.numpy(), centers) for y in states]).T
    left.errorbar(times, *found, fmt="o", ms=4, color=colours[i], label=f"start at {angle:g}")
    known = [law.at(t, angle, norm=norm).angle.total_variation(law.equilibrium) for t in fine]
    left.plot(fine, known, color=colours[i], lw=1)
left.set(xlabel="time $T$ of (13)", ylabel=r"distance from $\pi$ in total variation")
_ = left.legend(frameon=False)

# %%
# One long simulation of the direction in the clock. Its states alone have the equilibrium of the
# clock; weighted by :math:`\|Y\|^4` they have :math:`\pi`.

around = circle.point(torch.linspace(-3.1, 3.1, n_chains, dtype=torch.float64))
clocks = np.linspace(0.0, (1.0 if quick else 8.0) * law.relaxation_time, 7 if quick else 33)
chains = solve(DirectionDiffusion(problem), around, clocks, dt=step, seed=2)
edges = np.linspace(-np.pi, np.pi, 25)
middles = 0.5 * (edges[1:] + edges[:-1])


def in_bins(y):
    inside = np.digitize(circle.angle(y).numpy(), edges[1:-1])[:, None] == np.arange(len(middles))
    return torch.from_numpy(inside / (edges[1] - edges[0]))


weighted, late = chains.equilibrium(in_bins), chains.ys[len(chains.ts) // 2 :]
plain = in_bins(late.flatten(0, 1)).unflatten(0, late.shape[:2]).mean(0)  # of each chain
_, right = plt.subplots(figsize=(6.0, 3.6), layout="constrained")
rows = (
    (r"weighted by $\|Y\|^4$", weighted.mean, weighted.standard_error, law.equilibrium),
    ("not weighted", plain.mean(0), plain.std(0) / n_chains**0.5, law.equilibrium_in_clock),
)
for (label, mean, error, known), colour, marker in zip(rows, colours[:2], "os", strict=True):
    right.errorbar(middles, mean, 2 * error, fmt=marker, color=colour, ms=4, lw=1, label=label)
    right.plot(grid, known.density(grid), color=colour, lw=1)
right.set(xlabel="angle along the circle", ylabel="density", ylim=(0, 0.5), title="lines: exact")
_ = right.legend(frameon=False)

# %%
# The two laws differ by 0.08 in total variation: an average that is not weighted is not one over
# the steps of SGD.

print(f"distance: {law.equilibrium.total_variation(law.equilibrium_in_clock):.3f}")
