r"""
Is this normal, and has it mixed? The training clock
====================================================

A small network with LayerNorm is trained on digits of which a third have wrong labels, so that the
gradients stay noisy. ``MixingClock`` is the only line that is added to the loop. It knows what the
norms should be, and how far noise has turned the weights: the angular clock :math:`v`.

The same network is trained twice, with batches that are drawn independently and with every sample
once an epoch. All norms and single steps are alike. Over many steps the directions are not: the
noise of an epoch sums to zero.
"""

# %%
# Which weights are scale-invariant is measured, by Euler's identity. The last layer is not, and
# LayerNorm's own gain and bias are not.

import os

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from manifold_sde.networks.data import digits
from manifold_sde.training import MixingClock, audit, scale_invariant_groups

quick = "MANIFOLD_SDE_QUICK" in os.environ
steps, batch_size = (3000, 16) if quick else (30000, 16)
torch.set_num_threads(1)

generator = torch.Generator().manual_seed(0)
data = digits(512)
inputs, labels = data.inputs.flatten(1).float(), data.targets.clone()
wrong = torch.rand(len(labels), generator=generator) < 0.3
labels[wrong] = torch.randint(10, (int(wrong.sum()),), generator=generator)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 32, bias=False), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 10)
    )


print(scale_invariant_groups(network(), inputs[:64]))

# %%
# Train, and keep the direction of the weights from time to time. ``sampling`` tells the clock in
# which order the data comes.


def batches(sampling):
    while True:
        if sampling == "iid":
            yield torch.randint(len(labels), (batch_size,), generator=generator)
        else:
            yield from torch.randperm(len(labels), generator=generator).split(batch_size)


def train(sampling):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-3)
    clock = MixingClock(model, optimizer, inputs=inputs[:64], sampling=sampling)
    directions, times = [], []
    for step, chosen in zip(range(steps), batches(sampling), strict=False):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
        optimizer.step()
        if step % 32 == 31:  # once an epoch
            directions.append(nn.functional.normalize(model[0].weight.detach().flatten(), dim=0))
            times.append(clock.time)
    return clock, torch.stack(directions), np.array(times)


runs = {sampling: train(sampling) for sampling in ("iid", "reshuffled")}

# %%
# The audit says whether norms and rotations are as they should be. They are for both runs, and it
# adds that the second explores nothing.

print(*(audit(clock) for clock, _, _ in runs.values()), sep="\n\n")

# %%
# On the left the norms: the two runs are one. On the right the mean of :math:`1 - \cos` between
# directions some steps apart, against the clock in between. Without a loss both would follow the
# line; a loss holds them back. Where every sample comes once an epoch they are held back more, at
# the same clock, and what is left is mostly the drift of a run that still learns.

figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
looks = zip(runs.items(), ("#0072B2", "#D55E00"), "os", strict=True)
for (sampling, (clock, directions, times)), color, mark in looks:
    at, _, norms = clock.history
    left.plot(at, norms["0.weight"], color=color, lw=1.4, label=sampling)
    # the first half is left out: the run is on its way down
    settled, clocks = directions[len(times) // 2 :], times[len(times) // 2 :]
    lags = np.unique(np.geomspace(1, len(settled) // 2, 12).astype(int))
    turned = [float(1 - (settled[lag:] * settled[:-lag]).sum(1).mean()) for lag in lags]
    between = [float((clocks[lag:] - clocks[:-lag]).mean()) for lag in lags]
    right.loglog(between, turned, color=color, marker=mark, ms=4, lw=1, label=sampling)
    print(f"{sampling}: v = {clock.time:.2f}, effective clock {clock.effective:.2f}")

left.axhline(audit(runs["iid"][0])["0.weight"].equilibrium, color="0.4", ls=":", label="at rest")
v = np.geomspace(*right.get_xlim(), 50)
right.plot(v, 1 - np.exp(-v / 2), color="black", lw=1, label=r"noise alone, $1 - e^{-v/2}$")
left.set(xlabel="steps", ylabel="norm of the first layer")
right.set(xlabel="clock $v$ in between", ylabel=r"mean of $1 - \cos$")
for axes in (left, right):
    axes.legend(frameon=False)
