r"""
The limit of gradient flow is not the nearest minimiser
=======================================================

Near the manifold of minimisers :math:`\Phi(x)` agrees with the nearest minimiser to first order in
the distance. Here is how far they part, against a truth that owes nothing to the toolkit, and the
drift of the weights under noise that comes of it.
"""

# %%
# The problem is that of :doc:`plot_limit_map`: :math:`L = \tfrac12 f^2` with :math:`f = (1 +
# a\,u_1)\,u_3` and :math:`u = x/\|x\|`. Its flow leaves :math:`\ln|u_2| + A_+\ln|u_1 - r_+| +
# A_-\ln|u_1 - r_-|` unchanged, which gives the angle of :math:`\Phi(x)` by solving one equation.

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.optimize import brentq

from manifold_sde import Geometry, problems

a = 0.8
problem = problems.varying_circle(amplitude=a, noise_scale=1.0)
circle, geometry = problem.facts.circle, Geometry(problem)
blue, orange, green = "#0072B2", "#D55E00", "#009E73"
root = np.sqrt(1 + 8 * a**2)
r = np.array([-1 + root, -1 - root]) / (4 * a)
weights = -(1 + 2 * a * r) / (2 * a * (r - r[::-1]))


def integral(u):
    return np.log(abs(u[1])) + weights @ np.log(abs(u[0] - r))


def exact_angle(x):
    level = integral(x / np.linalg.norm(x))

    def excess(angle):
        return integral(np.array([np.cos(angle), np.sin(angle)])) - level

    return brentq(excess, np.arccos(r[0]) + 1e-9, np.pi - 1e-9, xtol=1e-15, rtol=1e-15)


# %%
# From a minimiser :math:`y` at 100° go a distance :math:`d` in a direction :math:`v` halfway
# between tangent and normal. The nearest minimiser will be off by :math:`O(d^2)`, and the black
# line on the left says by how much: it is how far :math:`\tfrac12 d^2\,\partial^2\Phi(y)[nn^\top]`,
# with :math:`n` the normal part of :math:`v`, moves along the unit tangent :math:`\tau` of the
# circle. With the whole second derivative the error is :math:`O(d^3)`, and ``limit_map`` is as
# right far away as nearby.

y = circle.point(torch.tensor(np.radians(100.0)))
tangent = torch.stack([-y[1], y[0], y[2]])
normal = torch.tensor([0.0, 0.0, 0.5**0.5], dtype=torch.float64)
v = tangent * 0.5**0.5 + normal
d = torch.from_numpy(np.geomspace(1e-3, 0.6, 15))[:, None]
x = y + d * v
truth = np.array([exact_angle(point) for point in x.numpy()])
first, second = geometry.tangent_projection(y, v), geometry.second_derivative(y, factor=v[:, None])
guesses = {
    "nearest minimiser": (x, orange, "D"),
    "expansion to second order": (y + d * first + 0.5 * d**2 * second, green, "s"),
    "limit_map": (geometry.limit_map(x), blue, "o"),
}
slip = 0.5 * d**2 * (geometry.second_derivative(y, factor=normal[:, None]) @ tangent)

# %%
# Noise goes to all sides: the first order averages out, the second does not, and half of
# :math:`\partial^2\Phi[\Sigma]` is a drift (dots, on the right). For the noise of (18), at scale 1,
# it is :math:`-\tfrac14\,d\log\mathrm{pdet}\,H/d\theta` along the circle (line). It points to 180°,
# where the loss is flattest, and where the equilibrium :math:`\pi\propto(\mathrm{pdet}\,H)^{-1/2}`
# has most of its mass (grey).

angles = np.arange(0.0, 361.0, 15.0)
at = circle.point(torch.from_numpy(np.radians(angles)))
along = torch.stack([-at[:, 1], at[:, 0], at[:, 2]], -1)
drift = 0.5 * (geometry.second_derivative(at) * along).sum(-1)
theta = np.linspace(0.0, 2 * np.pi, 721)
depth = (1 + a * np.cos(theta)) ** 2  # pdet H

figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.0), layout="constrained")
for name, (points, colour, marker) in guesses.items():
    error = abs(circle.angle(points).numpy() - truth)
    left.loglog(d, error, marker, color=colour, ms=5, label=name)
law = r"$\frac{1}{2}d^2\,\langle\tau,\,\partial^2\Phi(y)[nn^\top]\rangle$"
left.loglog(d, slip.numpy(), color="black", lw=1, zorder=0, label=law)
left.set(xlabel="distance $d$ from the manifold", ylabel="error of the angle", ylim=(1e-19, 1))
left.legend(frameon=False, loc="lower right")

right.plot(np.degrees(theta), 0.5 * a * np.sin(theta) / depth**0.5, color="black", lw=1)
right.plot(angles, drift, "o", color=blue, ms=5)
right.fill_between(np.degrees(theta), -1.3, -1.3 + 0.09 * depth**-0.5, color="0.85", lw=0)
right.text(60.0, -1.1, r"equilibrium $\pi$", ha="center")
right.set(xlabel=r"angle $\theta$ on the circle of minimisers", ylabel="drift of the angle")
right.set(xticks=range(0, 361, 90), yticks=[-0.5, 0.0, 0.5], ylim=(-1.3, 0.85))
right.xaxis.set_major_formatter("{x:.0f}°")
plt.show()

# %%
# In numbers, at the largest distance:

for name, (points, _, _) in guesses.items():
    off = np.degrees(circle.angle(points[-1]).item() - truth[-1])
    print(f"{name:26} {off:+.1e} degrees")
