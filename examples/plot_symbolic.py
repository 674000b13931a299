r"""
Where gradient flow ends, in closed form
========================================

For :math:`L = (x_1 x_2)^2 / 2\|x\|^4` the limit map :math:`\Phi` of gradient flow is known, and is
not the nearest minimiser. Given to SymPy it is checked, differentiated, and turned into torch code.
What the difference does to the drift along the manifold is seen on the right.
"""

# %%
# Along the flow :math:`x_1^2 - x_2^2` stays the same up to the scale of :math:`x`. From
# :math:`|x_1| > |x_2|` it ends on the circle :math:`x_2 = 0`. The formula is believed only after it
# has been measured: among other things it must be constant along the flow.

import os

import matplotlib.pyplot as plt
import numpy as np
import sympy
import torch

from manifold_sde import Geometry, Problem, SphericalNoise
from manifold_sde.symbolic import ClosedForm

quick = "MANIFOLD_SDE_QUICK" in os.environ
scale = 0.5

x1, x2, x3 = x = sympy.symbols("x1:4", real=True)
norm = sympy.sqrt(x1**2 + x2**2 + x3**2)
end = sympy.sqrt(x1**2 - x2**2 + x3**2)
phi = [norm * x1 * sympy.sqrt(1 - x2**2 / x1**2) / end, 0, norm * x3 / end]
problem = Problem.from_sympy((x1 * x2 / norm**2) ** 2 / 2, x, SphericalNoise(scale), limit_map=phi)
for name, defect in problem.closed_form.defects.items():
    print(f"{defect:8.0e}  {name}")

# %%
# The nearest minimiser of the same norm has all of these properties but one.

flat = sympy.sqrt(x1**2 + x3**2)
nearest = ClosedForm([norm * x1 / flat, 0, norm * x3 / flat], x)

# %%
# Flow lines from points off the circle, by small steps of gradient descent, with the place where
# :math:`\Phi` says that they end; in the angle along the circle and the latitude above it.


def angles(points):
    along = torch.atan2(points[..., 2], points[..., 0])
    return along, torch.asin(points[..., 1] / points.norm(dim=-1))


latitude, along = torch.meshgrid(
    torch.tensor([-0.42, 0.42], dtype=torch.float64),
    torch.linspace(-0.85, 0.85, 5, dtype=torch.float64),
    indexing="ij",
)
start = torch.stack(
    [latitude.cos() * along.cos(), latitude.sin(), latitude.cos() * along.sin()], -1
)
line = [start]
for _ in range(400 if quick else 4000):
    line.append(line[-1] - (0.1 if quick else 0.01) * problem.gradient(line[-1]))
line = torch.stack(line)

# %%
# The drift along the circle, :math:`\tfrac12\langle t, \partial^2\Phi[\Sigma]\rangle`. With the
# noise of (18) theory says :math:`-\tfrac{s^2}{4}\,\partial_\theta \log\operatorname{pdet} H =
# \tfrac{s^2}{2}\tan\theta`: noise drives the weights to where the loss is flat. Of the nearest
# minimiser that drift is zero.

theta = torch.linspace(-1.2, 1.2, 25, dtype=torch.float64)
zero = torch.zeros_like(theta)
y = torch.stack([theta.cos(), zero, theta.sin()], -1)
tangent = torch.stack([-theta.sin(), zero, theta.cos()], -1)
covariance = problem.noise_covariance(y)
drift = 0.5 * (tangent * Geometry(problem).second_derivative(y)).sum(-1)
wrong = 0.5 * (tangent * nearest.second_derivative(y, covariance)).sum(-1)
assert torch.allclose(drift, 0.5 * scale**2 * theta.tan())

figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
for path in line.flatten(1, 2).unbind(1):
    left.plot(*angles(path), color="tab:blue", lw=1)
ends = problem.closed_form.limit_map(start)
left.plot(*angles(ends.reshape(-1, 3)), "o", color="tab:blue", ms=5, label=r"$\Phi(x)$")
left.plot(*angles(nearest.limit_map(start).reshape(-1, 3)), "x", color="tab:red", label="nearest")
left.axhline(0.0, color="0.7", lw=1, zorder=0)
left.set(xlabel=r"angle along $\Gamma_1$", ylabel="latitude", title="gradient flow")
left.set(xticks=[-1.0, -0.5, 0.0, 0.5, 1.0], ylim=(-0.62, 0.47))
left.legend(loc="lower center", ncols=2)

fine = np.linspace(-1.2, 1.2, 200)
right.plot(fine, 0.5 * scale**2 * np.tan(fine), color="0.6", label=r"$\frac{s^2}{2}\tan\theta$")
right.plot(theta, drift, "o", color="tab:blue", ms=4, label=r"with $\Phi$")
right.plot(theta, wrong, "x", color="tab:red", ms=4, label="with the nearest minimiser")
right.set(xlabel=r"angle along $\Gamma_1$", title=r"drift along $\Gamma_1$")
right.legend()
plt.show()
