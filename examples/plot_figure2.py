r"""
Figure 2 of the paper, in small
===============================

Section 6.1 of the paper trains the normalised linear model with SGD and weight decay from one
start, and looks at the directions of the weights on the plane of minimisers. Here are fewer runs
and larger learning rates than in the paper; ``manifold-sde figure 2`` makes the real figure.
"""

# %%
# A row of boxes has one learning rate, a box one number of steps. If the time scale (12) is right,
# boxes along a dashed curve look alike: smaller learning rates lag behind, by a logarithm.

import os

import matplotlib.pyplot as plt
import torch

from manifold_sde.experiments.figure2 import (
    Settings,
    compare,
    plot_angle_law,
    plot_boxes,
    plot_variance_ratio,
    simulate,
)

torch.set_num_threads(1)  # the tensors are small
quick = "MANIFOLD_SDE_QUICK" in os.environ
settings = Settings(
    lrs=(0.04, 0.01),
    runs=30,
    law_runs=100,
    horizon=0.1 if quick else 2.0,
    columns=8,
    compiled=False,  # so few steps take less time than compiling does
)
figure = simulate(settings)
_, ax = plt.subplots(figsize=(9, 3), layout="constrained")
plot_boxes(figure, ax)
plt.show()

# %%
# The paper compares by eye. In the limit of small learning rates the angle has a law that is known
# exactly: wrapped normal, with a variance in closed form. SGD on the paper's Gaussian inputs is not
# near it at these learning rates, because the circle is small and the Hessian badly conditioned:
# directions fall off the circle, and some cross its middle. With orthogonal inputs SGD is near it.

_, axes = plt.subplots(2, 2, figsize=(8, 5.5), layout="constrained")
for design, row in zip(("gaussian", "orthogonal"), axes, strict=True):
    plot_angle_law(figure, design, 0.01, row[0])
    plot_variance_ratio(figure, design, row[1]).legend()
    row[0].set(title=f"{design} inputs, η = 0.01", ylabel=f"density at $T = {settings.horizon:g}$")
    row[1].set(title="variance of the angle", ylabel="SGD's over the limit's")
    row[1].locator_params(axis="x", nbins=5)
plt.show()

# %%
# The same in numbers: variance of the unwrapped angle over that of the limit, and the p-value of
# Watson's test of the angle on the circle.

for row in compare(figure):
    ratio = f"{row.variance_ratio:.2f} ± {row.standard_error:.2f}"
    print(f"{row.design:10}  η = {row.lr:<5g} T = {row.T:<5g} {ratio}   p = {row.p_angle:.2g}")
