r"""
A log file in, an answer out
============================

A run is over, and what is left of it is a file with its norms. Were they what its rates make of
them? Has it mixed? How many steps would it take at a smaller learning rate? All that is read here
is ``run.jsonl``: a JSON object a line (or a CSV file) with the step, the learning rate, the norm of
the weights, and one number that tells where they are, such as a logit of a fixed batch.
"""

# %%
# The file comes from SGD on a circle of minimisers of varying curvature, where the answers are
# known from elsewhere. Nothing below looks at anything but the file.

import json
import os
from pathlib import Path
from tempfile import mkdtemp

import matplotlib.pyplot as plt
import torch

from manifold_sde import problems
from manifold_sde.solvers import run_sgd
from manifold_sde.training import TrainingSettings, audit, plan, relaxation
from manifold_sde.verification.exact import spectral_gap

torch.set_num_threads(1)  # the tensors are small
quick = "MANIFOLD_SDE_QUICK" in os.environ
steps = range(0, 30_001 if quick else 120_001, 250)
problem = problems.varying_circle(noise_scale=0.3)
run = run_sgd(problem, 1.5 * problem.minimizer, lr=0.1, weight_decay=0.02, steps=list(steps))
log = Path(mkdtemp()) / "run.jsonl"
with log.open("w") as file:
    for step, x in zip(steps, run.ys, strict=True):
        row = {"step": step, "lr": 0.1, "w.norm": float(x.norm()), "probe": float(x[0] / x.norm())}
        file.write(json.dumps(row) + "\n")
print(log.read_text().splitlines()[-1])

# %%
# Is this normal? (``manifold-sde audit run.jsonl --optimizer sgd --weight-decay 0.02`` prints the
# same, and writes a page.)

report = audit(log, optimizer="sgd", weight_decay=0.02)
print(report)

# %%
# Has it mixed? The norms give the clock at each row, and the probe the relaxation time, here with
# one time scale taken for granted (``modes=1``). Without, it takes three hundred relaxation times.

probe = [json.loads(line)["probe"] for line in log.read_text().splitlines()]
clock = report.clocks["w.norm"]
found = relaxation({"probe": probe}, clock, modes=1)
print(found)
if not quick:
    exact = float(problem.noise_trace(problem.minimizer)) * spectral_gap(problem).relaxation_time
    print(f"\nBy the generator of the diffusion the relaxation time is {exact:.2f}.")

# %%
# And at a tenth of the learning rate, going on from here? The norm is too large for it and has to
# come down first, so that it takes more than ten times as many steps.

before = TrainingSettings(lr=0.1, weight_decay=0.02)
planned = plan(found, lr=0.01, weight_decay=0.02, relaxations=1, before=before)
print(planned)
print(f"at the old rate {plan(found, lr=0.1, weight_decay=0.02, relaxations=1).steps[1]:,.0f}")

# %%
# The norms against their prediction, and the steps at other rates.

figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.9), layout="constrained")
report.plot(left)
planned.plot(right)
plt.show()
