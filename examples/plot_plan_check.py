r"""
Was the plan right? A residual network, at a large rate and at a small one
==========================================================================

A scale-invariant residual network is trained by SGD with momentum on digits of which a third have
wrong labels. A run at a large learning rate measures how long the direction of the weights takes to
relax, in the clock of the noise. The plan says how many steps that is at a fifth of the rate and
twice the weight decay. Then the small run is made, to see.
"""

# %%
# One loop for both. ``Records`` keeps a few projections of the direction beside the clock; all of
# the direction is kept to look at afterwards. A fifth of the run is left out.

import os

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn.functional import cross_entropy, normalize
from torch.nn.utils import parameters_to_vector

from manifold_sde.networks import ScaleInvariantPreResNet
from manifold_sde.networks.data import digits
from manifold_sde.training import MixingClock, Records, directions_of, plan, relaxation

quick = "MANIFOLD_SDE_QUICK" in os.environ
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
data = digits(256)
images, labels = data.inputs.float(), data.targets.clone()
wrong = torch.rand(len(labels), generator=generator) < 0.3
labels[wrong] = torch.randint(10, (int(wrong.sum()),), generator=generator)


def train(steps, **rates):
    model = ScaleInvariantPreResNet(8, 3, in_channels=1)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(trained, momentum=0.9, **rates)
    clock = MixingClock(model, optimizer, inputs=images[:16], sampling="iid")
    records, kept = Records(directions_of(model)), []
    for step in range(steps):
        batch = torch.randint(len(labels), (16,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        if step % 10 == 0 and step >= steps // 5:
            records.record(step, clock)
            kept.append(normalize(parameters_to_vector(trained).detach(), dim=0))
    z = torch.stack(kept) - torch.stack(kept).mean(0)
    alike = [float((z[lag:] * z[: len(z) - lag]).sum(1).mean()) for lag in range(len(z) // 3)]
    elapsed = (records.clock[-1] - records.clock[0]) / (len(z) - 1) * np.arange(len(alike))
    return records, 10 * np.arange(len(alike)), elapsed, np.array(alike) / alike[0]


large, small = {"lr": 0.05, "weight_decay": 0.02}, {"lr": 0.01, "weight_decay": 0.04}
records, *at_large = train(400 if quick else 3500, **large)

# %%
# The relaxation time, and the plan of the small run. It is taken for granted that there is one time
# scale (``modes=1``); without that, the run would have to be ten times as long.

found = relaxation(records, modes=1)
planned = plan(found, relaxations=1, momentum=0.9, **small)
print(found)
print(planned)

# %%
# The correlation of directions with those some steps later, about their mean. Where that of the
# large run is after one relaxation time, that of the small one should be after the steps of the
# plan (green, with its interval). Five times the steps of the large run, because the learning rate
# is a fifth, are too many. On the right the same curves against the clock in between.

_, *at_small = train(200 if quick else 4200, **small)
level = np.interp(found.estimate, *at_large[1:])
by_rate = 5 * np.interp(found.estimate, at_large[1], at_large[0])
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained", sharey=True)
for run, color, name in (at_large, "#D55E00", "large rate"), (at_small, "#0072B2", "small rate"):
    left.plot(run[0], run[2], color=color, label=name)
    right.plot(run[1], run[2], color=color)
left.axvspan(planned.steps[0], min(planned.steps[2], 2 * by_rate), color="#009E73", alpha=0.2, lw=0)
left.axvline(planned.steps[1], color="#009E73", label="the plan")
left.axvline(by_rate, color="0.45", ls="--", label="steps = const / lr")
right.plot([found.estimate], [level], "o", color="#009E73")
left.set(xlabel="steps in between", ylabel="correlation", xlim=(0, 1.5 * by_rate))
right.set(xlabel="clock $v$ in between", xlim=(0, 4 * found.estimate))
left.legend(frameon=False, fontsize="small")
plt.show()

# %%
# A large run that is too short bounds no relaxation time from above, as in the quick form of this
# example: then there is no plan to check, and what is said is how long the run would have to be.

if np.isfinite(planned.steps[2]):
    reached = np.interp(-level, -at_small[2], at_small[0])
    print(f"planned {planned.steps[1]:.0f} steps; the small run is there after {reached:.0f}")
else:
    print(f"no plan to check: {found.needed / found.length:.0f} times as long a run is needed")
