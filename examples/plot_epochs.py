r"""
Every sample once an epoch: the norms go on, exploration stops
==============================================================

PyTorch's loaders show every sample once an epoch; the paper's SGD draws each batch anew. Here the
gradients of samples differ by vectors that sum to zero, and the minimisers of norm 1 are a circle.
Independent noise turns the weights by an angle of variance :math:`s^2u`, the clock. In epochs, what
a sample does is undone by the others before it comes again, but for the part that is fresh at each
visit: augmentation, dropout. The norms know nothing of it.
"""

import os

import matplotlib.pyplot as plt
import torch

from manifold_sde import Problem, SamplingNoise
from manifold_sde.solvers import run_sgd

torch.set_num_threads(1)  # the tensors are small
quick = "MANIFOLD_SDE_QUICK" in os.environ
samples, dim, epochs, paths = (32, 6, 16, 200) if quick else (64, 6, 24, 1000)
vectors = torch.randn(samples, dim, generator=torch.Generator().manual_seed(0)).double()
vectors = torch.linalg.qr(vectors - vectors.mean(0))[0] * (samples / dim) ** 0.5


def losses(x):
    y = x / x.square().sum().sqrt()
    return 0.5 * y[2:].square().sum() + vectors.to(x) @ y


class Augmented(SamplingNoise):  # a fifth of the covariance is new at each visit
    def draw_counts(self, loss):
        return self.n_components(loss), self.batch_size

    def stochastic_gradient(self, loss, x, normals, uniforms):
        mean, drawn = loss.gradient(x), super().stochastic_gradient(loss, x, normals, uniforms)
        return mean + 0.8**0.5 * (drawn - mean) + 0.2**0.5 * self.product(loss, x, normals)


noises = {"independent": SamplingNoise(), "epochs": SamplingNoise(replacement="epoch")}
noises["epochs, 20 % fresh"] = Augmented(replacement="epoch")
start, steps = 1.3 * torch.eye(dim).double()[0], list(range(0, epochs * samples + 1, samples))
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
looks = (("#0072B2", 5.0), ("#D55E00", 3.0), ("#009E73", 1.0))  # three norms that are one
for (name, noise), (color, width) in zip(noises.items(), looks, strict=True):
    problem = Problem(losses, dim, noise, rank=dim - 2)
    run = run_sgd(problem, start, lr=0.05, weight_decay=0.02, steps=steps, n_paths=paths)
    norm, clock = run.ys.norm(dim=-1).mean(1), run.clock.mean(1) / dim
    explored = torch.atan2(run.ys[..., 1], run.ys[..., 0]).var(1)
    left.plot(steps, norm, color=color, lw=width, label=name)
    error = 2 * explored * (2 / paths) ** 0.5  # two standard errors of a variance
    right.errorbar(clock[1:], explored[1:], error[1:], color=color, label=name)
    print(f"{name:20} norm {norm[-1]:.3f}, explored {explored[-1] / clock[-1]:.4f} of the clock")
right.plot(clock[1:], clock[1:], color="black", lw=1, ls=":", label="the clock")
left.set(xlabel="steps", ylabel="mean norm of the weights")
right.set(xlabel="clock $s^2u$", ylabel="variance of the angle", yscale="log")
for axes in (left, right):
    axes.legend(frameon=False, fontsize="small")
