"""Data sets of maps as data of a network: read once, in memory or from a file."""

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from manifold_sde import Problem, SamplingNoise, errors
from manifold_sde.networks import datasets

GENERATOR = torch.Generator().manual_seed(3)
INPUTS = torch.randn(70, 6, dtype=torch.float64, generator=GENERATOR)
CLASSES = torch.randint(3, (70,), generator=GENERATOR)
MODULE = nn.Sequential(nn.Linear(6, 3, dtype=torch.float64))


class Samples(Dataset[Any]):
    """Samples by a function of their number."""

    def __init__(self, function: Any, count: int = 70) -> None:
        self.function, self.count = function, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        if i >= self.count:
            raise IndexError(i)
        return self.function(i)


def plain(i: int) -> tuple[Tensor, int]:
    return INPUTS[i], int(CLASSES[i])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([plain(0)])


def made(source: Any, **options: Any) -> Problem:
    return Problem.from_module(
        MODULE, nn.CrossEntropyLoss(), source, None, SamplingNoise(4), **options
    )


SOURCES: dict[str, Any] = {
    "data set": Samples(plain),
    "of tensors": TensorDataset(INPUTS, CLASSES),
    "loader that shuffles": DataLoader(Samples(plain), batch_size=7, shuffle=True),
    "loader that collates": DataLoader(
        Samples(lambda i: i), collate_fn=lambda b: (INPUTS[b], CLASSES[b])
    ),
}


@pytest.mark.parametrize(
    ("which", "memory"), [*((which, None) for which in SOURCES), ("data set", 10_000)]
)
def test_a_data_set_makes_the_problem_of_its_tensors(which: str, memory: int | None) -> None:
    """In memory and from a file, bit by bit; torch's generator is not moved."""
    want = Problem.from_module(
        MODULE, nn.CrossEntropyLoss(), INPUTS, CLASSES, SamplingNoise(4), memory=memory
    )
    before = torch.get_rng_state()
    problem = made(SOURCES[which], memory=memory)
    assert torch.equal(torch.get_rng_state(), before)
    x = problem.vector(MODULE)
    for name in ("loss", "gradient", "sample_losses", "hessian"):
        assert torch.equal(getattr(problem, name)(x), getattr(want, name)(x))


def test_larger_data_stand_in_a_file_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []
    from_file = torch.from_file

    def spy(path: str, **options: Any) -> Tensor:
        seen.append(Path(path))
        return from_file(path, **options)

    monkeypatch.setattr(torch, "from_file", spy)
    (inputs,), targets = datasets.read(Samples(plain), 100, False)
    assert [path.parent for path in seen] == [tmp_path, tmp_path]
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(inputs, INPUTS)
    assert torch.equal(targets, CLASSES)
    seen.clear()
    datasets.read(Samples(plain), 1 << 20, False)
    assert seen == []


def test_several_inputs_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = MODULE

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.layer(x * scale[:, None])

    source = Samples(lambda i: (INPUTS[i], float(i), int(CLASSES[i])), 20)
    problem = Problem.from_module(
        Product(), nn.CrossEntropyLoss(), source, None, SamplingNoise(4), progress=True
    )
    said = capsys.readouterr().err
    assert "data, " in said
    assert "20/20" in said
    assert "samples looked at" in said
    x = problem.vector()
    want = MODULE(INPUTS[:20] * torch.arange(20.0)[:, None].double()).detach()
    torch.testing.assert_close(problem.outputs(x), want)


A, D, S = errors.ArgumentError, errors.DTypeError, errors.ShapeError
REFUSED: dict[str, tuple[type[Exception], Any, str]] = {
    "stream": (A, Stream(), "TensorDataset"),
    "empty": (A, Samples(plain, 0), "empty"),
    "random": (
        A,
        Samples(lambda i: (torch.rand(6, dtype=torch.float64), 1)),
        "without random transforms",
    ),
    "random here and there": (
        A,
        Samples(lambda i: (INPUTS[i] * (1 + (i == 5) * torch.rand(())), 1)),
        "first 8 samples",
    ),
    "not finite": (
        errors.NonFiniteError,
        Samples(lambda i: (INPUTS[i] / (i != 0), 1)),
        "NaN or infinity",
    ),
    "dictionaries": (D, Samples(lambda i: {"x": INPUTS[i], "y": 1}), "a batch that is a dict"),
    "no targets": (D, Samples(lambda i: INPUTS[i]), "inputs and a target"),
    "names": (D, Samples(lambda i: (INPUTS[i], "cat")), "of Tensor, tuple"),
    "shapes": (S, Samples(lambda i: (INPUTS[i, : 5 + (i < 64)], 1)), "from sample 64 on"),
    "shapes in a batch": (A, Samples(lambda i: (INPUTS[i, : 5 + (i < 9)], 1)), "one shape"),
    "raises": (A, Samples(lambda i: plain(i * 2)), "IndexError"),
    "dtypes": (
        S,
        Samples(lambda i: (INPUTS[i].to([torch.float64, torch.float32][i // 64 > 0]), 1)),
        "differ",
    ),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_is_no_data_set_of_maps_is_refused_with_the_way_out(which: str) -> None:
    kind, source, words = REFUSED[which]
    with pytest.raises(kind, match=words) as caught:
        made(source)
    assert isinstance(caught.value, errors.ManifoldSDEError)
    assert caught.value.remedy


def test_a_disk_that_is_full_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    full = SimpleNamespace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(errors.ArgumentError, match="TMPDIR"):
        made(Samples(plain), memory=3000)
    made(Samples(plain), memory="1 GiB")


LARGE = """
    import resource, sys
    import torch
    from torch import nn
    from torch.utils.data import Dataset
    from manifold_sde import Problem, SamplingNoise
    from manifold_sde.solvers import run_sgd

    class Images(Dataset):
        def __len__(self):
            return {count}

        def __getitem__(self, i):
            generator = torch.Generator().manual_seed(i)
            return torch.randn(3, 32, 32, generator=generator), i % 10

    def layers(a, b):
        return [nn.Conv2d(a, b, 3, stride=2, bias=False), nn.GroupNorm(1, b), nn.ReLU()]

    module = nn.Sequential(
        *layers(3, 8), *layers(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )
    problem = Problem.from_module(
        module, nn.CrossEntropyLoss(), Images(), None, SamplingNoise(32), memory="{memory}"
    )
    x = problem.vector(module)
    problem.gradient(x)
    problem.pointwise.hessian_product(x, x)
    run_sgd(problem, x, 0.1, 0.01, 10)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_of(count: int, memory: str) -> float:
    """Largest resident memory of a process in GiB."""
    program = textwrap.dedent(LARGE).format(count=count, memory=memory)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout) / 2**20


@pytest.mark.thorough
def test_fifty_thousand_images_fit_into_four_gigabytes() -> None:
    """One pass would take 1.5 MiB an image, and 70 GiB in all."""
    assert peak_of(50_000, "1 GiB") < 4.0
