r"""
The limiting diffusion of a network on real images
==================================================

A normalised network that fits handwritten digits has a manifold of minimisers, and the noise of
SGD moves it along that manifold. Here the limiting diffusion of such a network is simulated
directly: no learning rate, no steps of SGD, and no matrix of the size of the weights squared.
First, the limit map :math:`\Phi` of trained weights, by gradient flow and by decaying the learning
rate as the paper does; then the diffusion, with what it does to test accuracy and curvature.
"""

# %%
# Twenty digits, a hidden layer behind a normalisation, a frozen last layer. Squared errors of ten
# outputs make 200 constraints on the weights.

import os

import matplotlib.pyplot as plt
import torch
from torch import nn

from manifold_sde import DirectionDiffusion, Geometry, Problem, SphericalNoise
from manifold_sde.networks import NormalizedMLP, invariant_groups
from manifold_sde.networks.data import digits
from manifold_sde.solvers import run_sgd, solve

torch.set_num_threads(1)
quick = "MANIFOLD_SDE_QUICK" in os.environ
data = digits(6 if quick else 20)
module = NormalizedMLP((64, 24, 10)).double()
problem = Problem.from_module(
    module, nn.MSELoss(), data.inputs, data.one_hot(), SphericalNoise(1.0)
)
problem = problem.with_noise(SphericalNoise((problem.dim - 1) ** -0.5))  # tr Sigma = 1 at norm 1
print(problem)
print(invariant_groups(problem))

# %%
# Train by SGD, which ends near the manifold and not on it: the noise keeps it away. What counts is
# the point of the manifold that gradient flow takes it to. The paper approximates it by decaying
# the learning rate; the flow itself is followed here to rounding. (While the rate decays the noise
# goes on moving the weights along the manifold, so that they end elsewhere on it.)

x = problem.vector(module)
x = x / x.norm()
steps = 300 if quick else 3000
trained = run_sgd(problem, x, lr=5e-3, weight_decay=0.0, steps=[0, steps], compile=False).ys[-1]
geometry = Geometry(problem, "matrix_free")
limit = geometry.limit_map(trained)
print(f"loss {problem.loss(trained):.2e} after training, {problem.loss(limit):.1e} after the flow")

decayed, apart = trained, []
for factor in (1.0, 0.3, 0.1, 0.03, 0.01):
    run = run_sgd(
        problem, decayed, lr=5e-3 * factor, weight_decay=0.0, steps=[0, steps // 5], compile=False
    )
    decayed = run.ys[-1]
    apart.append(float((decayed - limit).norm() / limit.norm()))
print("distance of the decayed weights from Phi(x):", [f"{d:.3f}" for d in apart])

# %%
# The direction diffusion from there, in the intrinsic clock: a few paths, of which functions are
# kept. Every state fits the digits to rounding.

start = limit / limit.norm()
groups = invariant_groups(problem)


def accuracy(y):
    right = problem.outputs(y, data.test_inputs).argmax(-1) == data.test_targets
    return right.double().mean(-1)


clocks = torch.linspace(0.0, 0.05 if quick else 1.0, 3 if quick else 17).tolist()
diffusion = solve(
    DirectionDiffusion(problem, geometry=geometry),
    start,
    clocks,
    n_paths=2 if quick else 8,
    dt=1 / 64,
    observables={
        "loss": problem.loss,
        "test accuracy": accuracy,
        "log pdet H": geometry.log_pseudo_determinant,
        "cosine with the start": lambda y: y @ start,
    },
)
print("largest loss on the way:", float(diffusion.observed["loss"][0].max()))

figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
for ax, name in zip(axes, ("test accuracy", "log pdet H", "cosine with the start"), strict=True):
    mean, error = diffusion.observed[name]
    ax.errorbar(clocks, mean, 2 * error, marker="o", ms=3, lw=1)
    ax.set(xlabel="intrinsic clock $u$", title=name)
plt.show()
