r"""
Three learning rates, one law
=============================

SGD with weight decay is run on the simplest problem there is: :math:`L = (x_3/\|x\|)^2/2` in three
dimensions, whose minimisers of unit norm are a circle. The noise walks along it. Against the number
of steps the three runs look different; against the time :math:`T = \tau_{\eta,\lambda}(k)` of
equation (12) they follow one curve, and the curve is known: the variance of the angle is
:math:`\hat\sigma^2 u(T)`, with :math:`u` the intrinsic clock.
"""

# %%
# Run SGD at three learning rates, each to the same time :math:`T`, and keep the weights on the way.
# ``steps`` of the time scale says how many steps a time takes; that is known before the run.

import os

import matplotlib.pyplot as plt
import numpy as np

from manifold_sde import TimeScale, problems
from manifold_sde.solvers import run_sgd

quick = "MANIFOLD_SDE_QUICK" in os.environ
n_paths, last_time = (64, 1.0) if quick else (2000, 1.5)
scale, weight_decay = 0.5, 0.1

problem = problems.great_circle(noise_scale=scale)
times = np.linspace(0.0, last_time, 16)
runs = {}
for lr in (0.1, 0.05, 0.02):
    counts = np.unique(TimeScale(lr, weight_decay).steps(times))
    runs[lr] = run_sgd(problem, problem.minimizer, lr, weight_decay, counts, n_paths=n_paths)

# %%
# The angle along the circle starts at zero and stays well below :math:`\pi` here, so that its
# variance needs no unwrapping.


def angle_variance(solution):
    angles = problem.facts.circle.angle(solution.ys)
    mean_square = (angles**2).mean(1)
    error = (angles**2).std(1) / n_paths**0.5
    return mean_square.numpy(), error.numpy()


# %%
# On the left the three runs have nothing in common. On the right the line is the law that the
# theory predicts, computed without running anything.

figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), sharey=True, layout="constrained")
markers = {0.1: "o", 0.05: "s", 0.02: "^"}
for lr, solution in runs.items():
    variance, error = angle_variance(solution)
    time_scale = TimeScale(lr, weight_decay)
    style = {"marker": markers[lr], "ms": 4, "lw": 0, "elinewidth": 1, "label": f"$\\eta = {lr:g}$"}
    left.errorbar(solution.ts, variance, error, **style)
    right.errorbar(time_scale.tau(solution.ts.numpy()), variance, error, **style)

fine = np.linspace(0.0, last_time, 200)
unit = TimeScale(1e-4, 1e-4)  # any rates will do: the clock at time T depends on T alone
clock = unit.clock(unit.tau_inverse(fine), noise_trace=scale**2 * 2, initial_norm=1.0)
right.plot(fine, scale**2 * clock, color="black", lw=1, label="the limit's law")

left.set_xlabel("steps $k$")
left.set_ylabel("variance of the angle")
right.set_xlabel(r"time $T = \tau_{\eta,\lambda}(k)$")
right.legend(frameon=False)
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %%
# The limit is one of small :math:`\eta / \|x\|^2`. That number says how far a run is from it, and
# weight decay makes it grow until the norm has settled.

for lr, solution in runs.items():
    ratio = lr / solution.norms[-1].square().mean()
    print(f"eta = {lr:<4g}  eta / |x|^2 = {ratio:.2f} at the end of the run")
