r"""
One run at a large learning rate, and the plan of a small one
=============================================================

How many steps does SGD take until it has forgotten where it started, at a learning rate at which
one cannot afford to find out? The direction of the weights is a diffusion in its own clock,
whatever the rates are. So its relaxation time is measured once, on a run at a large rate, and
turned into steps of any other run. Here the problem is a circle of minimisers of varying curvature,
on which all of it can be compared with the truth.
"""

# %%
# A training loop as any other: here of many runs at once, one a row, with the noise of (18) added
# to the gradient. The clock is read off the run; what is recorded is one function of the weights,
# the cosine of the angle.

import os

import matplotlib.pyplot as plt
import numpy as np
import torch

from manifold_sde import problems
from manifold_sde.training import plan, relaxation
from manifold_sde.verification.exact import law_of, spectral_gap

torch.set_num_threads(1)  # the tensors are small
quick = "MANIFOLD_SDE_QUICK" in os.environ
lr, decay, steps, paths = (0.2, 0.03, 10_000, 100) if quick else (0.04, 0.03, 60_000, 400)


def train(norm, lr, steps, paths, records=200):
    """The steps, the clock u and the cosine of the angle at some of them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.tensor([[norm, 0.0, 0.0]] * paths, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr, weight_decay=decay)
    u, rows = torch.zeros(paths, dtype=torch.float64), []
    for k in range(steps + 1):
        if k % (steps // records) == 0:
            cosine = x.detach()[:, 0] / x.detach()[:, :2].norm(dim=1)
            rows.append((k, u.numpy().copy(), cosine.numpy()))
        r = x.norm(dim=1, keepdim=True)
        y = x / r
        loss = 0.5 * ((1 + 0.5 * y[:, 0]) * y[:, 2]).square().sum()
        optimizer.zero_grad()
        loss.backward()
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        noise -= y.detach() * (y.detach() * noise).sum(1, keepdim=True)
        x.grad += 0.3 / r.detach() * noise
        optimizer.step()
        u += lr**2 / ((1 - lr * decay) * r.detach()[:, 0] ** 2) ** 2
    return (np.array(part) for part in zip(*rows, strict=True))


problem = problems.varying_circle(noise_scale=0.3)
trace = float(problem.noise_trace(problem.minimizer))
balance = (trace * lr / (2 * decay)) ** 0.25  # of the norm
_, u, cosine = train(balance, lr, steps, 1)
clock = trace * u[:, 0]  # the angular clock: V times the intrinsic one

# %%
# The relaxation time, with its interval. Here it is known that one time scale dominates
# (``modes=1``); without that, thirty relaxation times are too few to tell, and this is said.

measured = relaxation({"cosine": cosine[:, 0]}, clock, modes=1)
print(measured, "\n")
print(relaxation({"cosine": cosine[:, 0]}, clock))

# %%
# The same from the generator of the diffusion, without a run: the Fokker-Planck equation on the
# circle.

exact = trace * spectral_gap(problem).relaxation_time
print(f"relaxation time {measured.estimate:.2f}, by the generator {exact:.2f}")

# %%
# The plan of a run at a tenth of the rate, from weights of norm 1.

planned = plan(measured, relaxations=1, lr=lr / 10, weight_decay=decay, norm=1.0, noise=trace)
print(planned)

# %%
# Was it right? Many runs at the small rate, and the mean of the cosine on the way. It is to be
# where the law of the diffusion is after one relaxation time (dotted) within the planned interval.
# What rules of thumb make of the large run is told apart: there a relaxation time takes so many
# steps, and a tenth of the rate should take ten times (or a hundred times) as many.

end = int(1.3 * planned.steps[1])
k, _, cosine = train(1.0, lr / 10, end, paths, records=32)
mean, error = cosine.mean(1), cosine.std(1) / paths**0.5
relaxed = law_of(problem).expectation(np.cos, exact / trace)

figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.9), layout="constrained")
left.axvline(exact, color="#D55E00", lw=1.2, ls=":", label="by the generator")
measured.plot(left, color="#0072B2")
right.errorbar(k, mean, error, color="#0072B2", lw=1.2, label="SGD at a tenth of the rate")
right.axvspan(planned.steps[0], min(planned.steps[2], end), color="#009E73", alpha=0.2, lw=0)
right.axvline(planned.steps[1], color="#009E73", lw=1.2, label="the plan")
right.axvline(5 * exact / (lr * decay), color="0.45", ls="--", label="steps = const / lr")
right.axhline(relaxed, color="#D55E00", lw=1.2, ls=":", label="after one relaxation time")
right.set(xlabel="steps", ylabel="mean cosine with the start", xlim=(0, end))
right.legend(frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
plt.show()

# %%
# And what it would cost at other rates.

planned.plot(plt.subplots(figsize=(6, 4), layout="constrained")[1])
plt.show()
