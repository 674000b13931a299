r"""
What the noise of SGD does to a vision transformer
==================================================

A small vision transformer with qk-norm is trained by AdamW until it fits its digits. Its loss with
noisy labels is never fitted: the samples disagree on the manifold of minimisers, and SGD goes on
moving. This noise has no part along the manifold, so that the limit is a flow and no diffusion, to
where :math:`\operatorname{tr} H` is small; where it rests takes the place of an equilibrium.
The weights are several groups that can be scaled separately; the flow is simulated in their clock.
"""

# %%
# A pre-norm transformer on 16 patches of 2 by 2 pixels, with a normalisation behind all that is not
# written into the stream, so that the theory covers all of its weights; the last layer is frozen.

import os
import warnings

import matplotlib.pyplot as plt
import torch
from torch import nn

from manifold_sde import Geometry, GroupDirectionDiffusion, LabelNoise, Problem
from manifold_sde.errors import NoDiffusionWarning
from manifold_sde.networks import LayerNorm, invariant_groups
from manifold_sde.networks.data import digits
from manifold_sde.solvers import solve

torch.set_num_threads(1)
quick = "MANIFOLD_SDE_QUICK" in os.environ


class Transformer(nn.Module):
    def __init__(self, width=12, hidden=16):
        super().__init__()
        self.embed = nn.Linear(4, width, bias=False)
        self.place = nn.Parameter(torch.randn(16, width))
        self.query, self.key, self.value, self.proj = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.norm, self.inner = LayerNorm(width), LayerNorm(hidden)
        self.head = nn.Linear(width, 10, bias=False)
        nn.init.orthogonal_(self.head.weight, gain=2.0)

    def forward(self, images):
        patches = images.reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        x = self.embed(patches) + self.place
        z = self.norm(x)
        q, k, v = self.norm(self.query(z)), self.norm(self.key(z)), self.norm(self.value(z))
        mixed = torch.softmax(q @ k.mT / 3.5, -1) @ v
        x = x + self.proj(mixed)
        x = x + self.down(torch.tanh(self.inner(self.up(self.norm(x)))))
        return self.head(self.norm(x).mean(1))


# %%
# AdamW, without weight decay, until every digit is fitted.

torch.manual_seed(0)
data = digits(4 if quick else 10)
module = Transformer().double()
module.head.requires_grad_(False)
steps = 400 if quick else 2000
optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.0)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
for _ in range(steps):
    loss = nn.functional.mse_loss(module(data.inputs), data.one_hot())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
print(f"loss {loss.item():.1e} after training")

problem = Problem.from_module(
    module, nn.MSELoss(), data.inputs, data.one_hot(), LabelNoise(0.3), frozen="head"
)
groups = invariant_groups(problem)
print(problem)
print(groups)

# %%
# From the point of the manifold that gradient flow leads to, the flow that SGD's noise makes: one
# path says all. The clock is that of the groups, whose norms are a part of the state.

geometry = Geometry(problem, "matrix_free")
x = problem.vector(module)
start = geometry.limit_map(x / x.norm())
sde = GroupDirectionDiffusion(problem, geometry=geometry, groups=groups)
times = torch.linspace(0.0, 0.05 if quick else 0.6, 2 if quick else 7)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", NoDiffusionWarning)  # which says that it is a flow
    flow = solve(sde, start / start.norm(), times, dt=1 / 20)
print("largest loss on the way:", float(problem.loss(flow.ys).max()))

# %%
# What falls is the trace of H, that of the noise with labels of variance 1. It depends on the norms
# of the groups, and is shown with these in balance. Beside it, the accuracy on all other digits.
# The run is the beginning of the way: tr H halves, and the accuracy gains one point in a hundred.

right = problem.outputs(flow.ys, data.test_inputs).argmax(-1) == data.test_targets
shown = {
    "tr $H$, groups in balance": problem.noise_trace(sde.balanced(flow.ys)) / 0.3**2,
    "accuracy on other digits": right.double().mean(-1),
    "norms of the groups, of the whole": sde.norms(flow.ys),
}
figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
for ax, (title, values) in zip(axes, shown.items(), strict=True):
    lines = ax.plot(times, values, marker="o", ms=3, lw=1)
    ax.set(xlabel="clock $s$ of the groups", title=title)
names = [name.split(",")[0].removesuffix(".weight") for name in groups.names]
axes[2].legend(lines, [*names[:-1], "stream"], fontsize=7)
plt.show()
