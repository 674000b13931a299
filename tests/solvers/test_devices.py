"""Nothing leaves the device of its input: tried on a device without data."""

from __future__ import annotations

import pytest
import torch

from manifold_sde import LabelNoise, SamplingNoise, SphericalNoise, problems
from manifold_sde.solvers import run_sgd
from manifold_sde.solvers.sgd_step import update

NOISES = [
    SphericalNoise(0.3),
    SamplingNoise(2),
    SamplingNoise(2, replacement=False),
    LabelNoise(0.3),
]


@pytest.mark.parametrize("noise", NOISES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_stays_on_its_device(noise, dtype):
    problem = problems.normalized_linear(seed=1, noise=noise)
    # The meta device refuses to meet a tensor of another one, as a real device does.
    x = torch.empty(10, 16, dtype=dtype, device="meta")
    paths = torch.arange(16, device="meta")
    step = torch.zeros((), dtype=torch.int64, device="meta")
    normals, uniforms = noise.numbers(problem.pointwise, (5, 6), paths, step, dtype)
    rate = torch.tensor(0.1, dtype=dtype, device="meta")
    new, clock = update(problem, x, x.new_zeros(16), rate, rate, normals, uniforms)
    for tensor in (normals, uniforms, new, clock):
        assert tensor.device.type == "meta"
        assert tensor.dtype == dtype
    assert new.shape == x.shape


def test_the_check_finds_a_tensor_left_behind():
    x = torch.empty(10, 16, device="meta")
    with pytest.raises(RuntimeError, match="device"):
        x + torch.arange(16)


@pytest.mark.cuda
def test_a_run_on_a_real_device():
    problem = problems.normalized_linear(seed=1)
    x0 = problem.minimizer.cuda()
    there = run_sgd(problem, x0, 0.02, 0.05, 50, n_paths=8, compile=False)
    here = run_sgd(problem, problem.minimizer, 0.02, 0.05, 50, n_paths=8, compile=False)
    assert there.ys.device.type == "cuda"
    torch.testing.assert_close(there.ys.cpu(), here.ys, rtol=1e-9, atol=1e-10)
