r"""
Where gradient flow ends, and why it matters
============================================

The limit map :math:`\Phi(x)` is the point of the manifold of minimisers where gradient flow from
:math:`x` ends. It is easily mistaken for the nearest minimiser. The two agree to first order in the
distance and differ in the second, and it is the second order that moves the weights: under noise
they drift to where the loss is flat. How far apart they are is in
:doc:`plot_limit_map_error`.
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

from manifold_sde import Geometry, problems

problem = problems.varying_circle(amplitude=0.8, noise_scale=1.0)
circle, geometry = problem.facts.circle, Geometry(problem)

longitude, latitude = np.radians(np.arange(15.0, 166.0, 15.0)), np.radians(52.0)
starts = np.cos(latitude) * circle.point(torch.from_numpy(longitude))
starts[:, 2] = np.sin(latitude)
limits, nearest = geometry.limit_map(starts), circle.point(circle.angle(starts))

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
    weight = torch.linspace(0.0, 1.0, 50, dtype=starts.dtype)[:, None]
    lines = torch.lerp(starts[:, None], ends[:, None], weight)
    return lines / lines.norm(dim=2, keepdim=True)


def page(points, elevation=24.0):  # where points are seen, from afar, from the angle of 90 degrees
    x, y, z = np.moveaxis(np.asarray(points), -1, 0)
    tilt = np.radians(elevation)
    return np.stack([-x, np.cos(tilt) * z - np.sin(tilt) * y], -1)


blue, orange, green = "#0072B2", "#D55E00", "#009E73"
figure, ax = plt.subplots(figsize=(7.4, 5.2), layout="constrained")
ax.add_patch(plt.Circle((0, 0), 1.0, facecolor="0.97", edgecolor="0.8"))

gamma = circle.point(torch.linspace(0.0, 2 * np.pi, 721, dtype=torch.float64))
depth = geometry.log_pseudo_determinant(gamma).exp().numpy()
pieces = np.stack([page(gamma)[:-1], page(gamma)[1:]], 1)
for half, width in ((slice(360, 720), 1.5), (slice(0, 360), 5.0)):  # behind, in front
    colours = {"cmap": "cividis", "norm": LogNorm(depth.min(), depth.max())}
    ring = LineCollection(pieces[half], lw=width, capstyle="round", **colours)
    ring.set_array(depth[half])
    ax.add_collection(ring)
bar = figure.colorbar(ring, label=r"$\mathrm{pdet}\,H$", shrink=0.6, ticks=[0.04, 0.1, 0.3, 1, 3])
bar.ax.yaxis.set_major_formatter("{x:g}")
bar.ax.minorticks_off()

for line in arcs(starts, nearest):
    ax.plot(*page(line).T, color=orange, lw=1.2, ls=(0, (4, 2)))
for line in flow_lines(starts):
    ax.plot(*page(line).T, color=blue, lw=1.4)
ax.plot(*page(starts).T, "o", color="white", mec="black", ms=5, label="start $x$")
ax.plot(*page(limits).T, "o", color=blue, mec="white", ms=7, label=r"$\Phi(x)$")
ax.plot(*page(nearest).T, "D", color=orange, mec="white", ms=6, label="nearest minimiser")

y = circle.point(torch.from_numpy(np.radians(np.arange(70.0, 151.0, 20.0))))
tangent = torch.stack([-y[:, 1], y[:, 0], y[:, 2]], -1)
along = 0.5 * (geometry.second_derivative(y) * tangent).sum(-1, keepdim=True) * tangent
foot, step = page(y) - [0.0, 0.09], page(0.4 * along)
ax.quiver(*foot.T, *step.T, angles="xy", scale_units="xy", scale=1, width=0.005, minlength=0)
ax.plot([], [], color="black", marker=r"$\rightarrow$", ms=14, lw=0, label="drift under noise")
ax.text(-1.05, 0.0, r"$\theta = 0°$", ha="right")
ax.text(1.05, 0.0, r"$\theta = 180°$", ha="left")
ax.set(aspect="equal", xlim=(-1.3, 1.35))
ax.set_axis_off()
ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.49, 0.27))
plt.show()
