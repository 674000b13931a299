"""The check of a CUDA machine: every line of it without one, and faults that it has to find."""

import pytest
import torch
from torch import Tensor

from tools import gpu_check


def test_it_runs_on_the_processor(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--device", "cpu", "--quick"]) == 0
    said = capsys.readouterr().out
    assert said.count("holds") == 4
    assert "FAILS" not in said
    assert said.count("64 paths |") == 2


def test_broken_twin_a_device_with_other_noise(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths that are a thousandth off, and a law of twice the angle."""
    real, calls = gpu_check.paths, []

    def paths(device: torch.device, n: int, steps: int) -> Tensor:
        calls.append(n)
        found = real(device, n, steps)
        return found * (1.0 + 1e-3 * (len(calls) == 1))

    monkeypatch.setattr(gpu_check, "paths", paths)
    monkeypatch.setattr(gpu_check, "same_numbers", lambda device: False)
    assert gpu_check.main(["--device", "cpu", "--quick"]) == 1
    said = capsys.readouterr().out
    assert said.count("FAILS") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 1
    assert "--device cpu" in capsys.readouterr().out
