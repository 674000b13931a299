r"""
When to decay the learning rate: Figures 1 and 3, in small
==========================================================

Section 6.2 of the paper trains a scale-invariant residual network by SGD with weight decay, decays
the learning rate at different times, and finds that later decays give better test accuracy, long
after accuracy and norm before the decay have stopped changing. Here it is a network of some
thousand weights on a few digits; ``manifold-sde figure 1`` and ``manifold-sde figure 3`` make the
figures.
"""

# %%
# All runs continue with a small learning rate from each of the times of decay. That stands for
# gradient flow, which would lead from :math:`x_t` to :math:`\Phi(x_t)`.

import os

import matplotlib.pyplot as plt
import torch

from manifold_sde.experiments.training import (
    Settings,
    plot_accuracies,
    plot_limit_accuracy,
    plot_norm,
    sentences,
    train,
)

torch.set_num_threads(1)  # the tensors are small
quick = "MANIFOLD_SDE_QUICK" in os.environ
settings = Settings.quick(
    n_train=100,
    n_test=300,
    width=3,
    epochs=8 if quick else 60,
    decays=4,
    decay_epochs=3 if quick else 15,
    runs=2,
)
run = train(settings)
_, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
plot_accuracies(run, axes[0])
plot_limit_accuracy(run, axes[1])
plt.show()

# %%
# The norm goes to an equilibrium between the weight decay, which shrinks the weights, and the
# gradient, which is orthogonal to them and makes them longer. Equation (10) says which, for a trace
# of the noise that is constant; here the trace is measured along the run, and is not.

plot_norm(run, plt.subplots(figsize=(6, 4), layout="constrained")[1])
plt.show()

# %%
# The same in words. So short a run of so few networks says little of the effect.

for sentence in sentences(run):
    print(sentence)
