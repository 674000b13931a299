r"""
Where gradient flow ends, and why it matters
============================================

The limit map :math:`\Phi(x)` is the point of the manifold of minimisers where gradient flow from
:math:`x` ends. It is easily mistaken for the nearest minimiser. The two agree to first order in the
distance and differ in the second, and it is the second order that moves the weights: under noise
they drift to where the loss is flat.
"""

# %%
# The problem is :math:`L = \tfrac12 f^2` with :math:`f = (1 + a\,u_1)\,u_3` and :math:`u = x/\|x\|`
# in three dimensions. The minimisers of unit norm are the circle :math:`u_3 = 0`; at the angle
# :math:`\theta` on it the one nonzero eigenvalue of the Hessian, and so its pseudo-determinant, is
# :math:`(1 + a\cos\theta)^2`.

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from scipy.integrate import solve_ivp
from scipy.optimize import brentq

from manifold_sde import Geometry, problems

a = 0.8
problem = problems.varying_circle(amplitude=a, noise_scale=1.0)
circle = problem.facts.circle
geometry = Geometry(problem)

longitude, latitude = np.radians(np.arange(15.0, 166.0, 15.0)), np.radians(52.0)
starts = torch.from_numpy(
    np.stack(
        [
            np.cos(latitude) * np.cos(longitude),
            np.cos(latitude) * np.sin(longitude),
            np.full_like(longitude, np.sin(latitude)),
        ],
        -1,
    )
)
limits = geometry.limit_map(starts)
nearest = circle.point(circle.angle(starts))

# %%
# Now the way there. SciPy draws the flow lines (blue): they slip sideways, to where the loss is
# flatter. Arcs of great circles (broken) lead straight to the nearest minimisers. The arrows are
# the part along the circle of the drift :math:`\tfrac12\partial^2\Phi[\Sigma]` that the noise of
# equation (18) causes.


def flow_lines(starts):
    def rate(_, state):
        return -problem.gradient(torch.from_numpy(state.reshape(-1, 3))).numpy().ravel()

    times = np.concatenate([[0.0], np.geomspace(1e-2, 1e3, 150)])
    flow = solve_ivp(rate, (0.0, 1e3), starts.numpy().ravel(), "LSODA", times, rtol=1e-7, atol=1e-9)
    return flow.y.reshape(len(starts), 3, -1).transpose(0, 2, 1)


def arcs(starts, ends):
    weight = torch.linspace(0.0, 1.0, 50)[:, None]
    lines = (1 - weight) * starts[:, None] + weight * ends[:, None]
    return lines / lines.norm(dim=2, keepdim=True)


def drift_along(angles):
    y = circle.point(angles)
    tangent = torch.stack([-y[:, 1], y[:, 0], y[:, 2]], -1)
    return 0.5 * (geometry.second_derivative(y) * tangent).sum(-1), tangent


def page(points, elevation=24.0):
    """Coordinates on the page of points seen from afar, from the angle of 90 degrees."""
    x, y, z = np.moveaxis(np.asarray(points), -1, 0)
    tilt = np.radians(elevation)
    return np.stack([-x, np.cos(tilt) * z - np.sin(tilt) * y], -1)


blue, orange, green = "#0072B2", "#D55E00", "#009E73"
figure, ax = plt.subplots(figsize=(7.4, 5.2), layout="constrained")
ax.add_patch(plt.Circle((0, 0), 1.0, facecolor="0.97", edgecolor="0.8"))

theta = np.linspace(0.0, 2 * np.pi, 721)
gamma = circle.point(torch.from_numpy(theta))
depth = geometry.log_pseudo_determinant(gamma).exp().numpy()
pieces = np.stack([page(gamma)[:-1], page(gamma)[1:]], 1)
for half, width in ((slice(360, 720), 1.5), (slice(0, 360), 5.0)):  # behind, in front
    colours = {"cmap": "cividis", "norm": LogNorm(depth.min(), depth.max())}
    ring = LineCollection(pieces[half], lw=width, capstyle="round", **colours)
    ring.set_array(depth[half])
    ax.add_collection(ring)
bar = figure.colorbar(ring, label=r"$\mathrm{pdet}\,H$", shrink=0.6, ticks=[0.04, 0.1, 0.3, 1, 3])
bar.ax.set_yticklabels(["0.04", "0.1", "0.3", "1", "3"])
bar.ax.minorticks_off()

for line in arcs(starts, nearest):
    ax.plot(*page(line).T, color=orange, lw=1.2, ls=(0, (4, 2)))
for line in flow_lines(starts):
    ax.plot(*page(line).T, color=blue, lw=1.4)
ax.plot(*page(starts).T, "o", color="white", mec="black", ms=5, label="start $x$")
ax.plot(*page(limits).T, "o", color=blue, mec="white", ms=7, label=r"$\Phi(x)$")
ax.plot(*page(nearest).T, "D", color=orange, mec="white", ms=6, label="nearest minimiser")

angles = torch.from_numpy(np.radians(np.arange(70.0, 151.0, 20.0)))
speed, tangent = drift_along(angles)
foot, step = page(circle.point(angles)) - [0.0, 0.09], page(0.4 * speed[:, None] * tangent)
arrow = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.005, "minlength": 0}
ax.quiver(*foot.T, *step.T, **arrow)
ax.plot([], [], color="black", marker=r"$\rightarrow$", ms=14, lw=0, label="drift under noise")
ax.text(-1.05, 0.0, r"$\theta = 0°$", ha="right")
ax.text(1.05, 0.0, r"$\theta = 180°$", ha="left")
ax.set(aspect="equal", xlim=(-1.3, 1.35))
ax.set_axis_off()
ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.49, 0.27))
plt.show()

# %%
# How far apart are the two? This flow leaves :math:`\ln|u_2| + A_+\ln|u_1 - r_+| + A_-\ln|u_1 -
# r_-|` unchanged, which gives the angle of :math:`\Phi(x)` by solving one equation: a truth that
# owes nothing to the toolkit.

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
drift = drift_along(torch.from_numpy(np.radians(angles)))[0].numpy()

figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.0), layout="constrained")
for name, (points, colour, marker) in guesses.items():
    error = abs(circle.angle(points).numpy() - truth)
    left.loglog(d, error, marker, color=colour, ms=5, label=name)
law = r"$\frac{1}{2}d^2\,\langle\tau,\,\partial^2\Phi(y)[nn^\top]\rangle$"
left.loglog(d, slip.numpy(), color="black", lw=1, zorder=0, label=law)
left.set(xlabel="distance $d$ from the manifold", ylabel="error of the angle", ylim=(1e-19, 1))
left.legend(frameon=False, loc="lower right")

slope = -2 * a * np.sin(theta) / (1 + a * np.cos(theta))  # of log pdet H
right.plot(np.degrees(theta), -0.25 * slope, color="black", lw=1)
right.plot(angles, drift, "o", color=blue, ms=5)
right.fill_between(np.degrees(theta), -1.3, -1.3 + 0.09 * depth**-0.5, color="0.85", lw=0)
right.text(60.0, -1.1, r"equilibrium $\pi$", ha="center")
right.set(xlabel=r"angle $\theta$ on the circle of minimisers", ylabel="drift of the angle")
right.set(xticks=range(0, 361, 90), yticks=[-0.5, 0.0, 0.5], ylim=(-1.3, 0.85))
right.xaxis.set_major_formatter("{x:.0f}°")
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %%
# In numbers, at the largest distance:

for name, (points, _, _) in guesses.items():
    off = np.degrees(circle.angle(points[-1]).item() - truth[-1])
    print(f"{name:26} {off:+.1e} degrees")
