"""``manifold-sde figure 1`` and ``figure 3``, on a terminal of 80 columns."""

import sys
from pathlib import Path

import numpy as np
import pytest

from manifold_sde.experiments.training import TrainingRun
from tests.experiments.test_cli import call, narrow, process, terminal

TINY = [
    *("--train-images", "40", "--test-images", "60", "--width", "3", "--epochs", "4"),
    *("--decays", "3", "--decay-epochs", "2", "--runs", "2"),
]
__all__ = ["terminal"]  # the fixture is used by all tests here


def figure(number: int, out: Path, *arguments: str) -> list[str]:
    return ["figure", str(number), *TINY, "--out", str(out), *arguments]


@pytest.mark.paper("Figure 1", "Figure 3")
def test_figure_3_uses_the_runs_of_figure_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new" / "folder"
    done = call(*figure(1, out, "--jobs", "1"))
    assert done.exit_code == 0, done.output
    for part in ("quick form", "1/(ηλ)", "epoch of the decay", "figure 1 --full", "norm"):
        assert part in done.output
    lines = done.output.splitlines()
    assert narrow("\n".join(line for line in lines if not line.startswith(str(tmp_path))))
    kinds = ("csv", "pdf", "png", "txt")
    expected = [f"figure1_quick.{kind}" for kind in kinds]
    expected = sorted([*expected, "figure1_quick.toml", "training_quick.npz"])
    assert sorted(p.name for p in out.iterdir()) == expected
    assert "norm" in (out / "figure1_quick.txt").read_text(encoding="utf-8")
    before = (out / "training_quick.npz").read_bytes()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("it trains again")

    monkeypatch.setattr("manifold_sde.experiments.training.command.train", never)
    done = call(*figure(3, out, "--jobs", "1"))
    assert done.exit_code == 0, done.output
    assert "--restart trains anew" in done.output
    assert (out / "figure3_quick.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "training_quick.npz").read_bytes() == before
    with pytest.raises(AssertionError, match="trains again"):
        call(*figure(3, out, "--jobs", "1", "--restart"), catch=False)
    refused = call(*figure(3, out, "--jobs", "1", "--seed", "5"))
    assert "there are results of this name" in refused.stderr
    assert (out / "training_quick.npz").read_bytes() == before
    with pytest.raises(AssertionError, match="trains again"):
        call(*figure(3, out, "--jobs", "1", "--seed", "5", "--overwrite"), catch=False)


@pytest.mark.slow
@pytest.mark.paper("Figure 3")
def test_two_processes_train_the_same(tmp_path: Path) -> None:
    four = ["--runs", "4"]
    one = call(*figure(3, tmp_path / "one", *four, "--jobs", "1"))
    two = process(*figure(3, tmp_path / "two", *four))
    assert one.exit_code == 0, one.output
    assert two.returncode == 0, two.stderr
    assert "runs 2-3: 4 epochs" in two.stdout
    first, second = (
        TrainingRun.load(tmp_path / name / "training_quick.npz") for name in ("one", "two")
    )
    for name, value in first.arrays().items():
        assert np.array_equal(value, second.arrays()[name]), name
    assert len(set(first.norm[:, -1])) == 4


def test_interrupt_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("manifold_sde.experiments.training.command.train", stop)
    done = call(*figure(1, tmp_path, "--jobs", "1"))
    assert done.exit_code == 130
    assert "goes on from here" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--data", "mnist"], "there are no such data"),
        (["--data", "cifar10"], "--data-dir DIR"),
        (["--data", "cifar10", "--data-dir", "nowhere"], "there is no such folder"),
        (["--norm", "instance"], "norm is not one of its choices"),
        (["--depth", "9"], "6n + 2"),
        (["--device", "cuda:99"], "cannot compute on this device"),
        (["--device", "nothing"], "cannot compute on this device"),
        (["--lr", "0"], "do not make Figures 1 and 3"),
        (["--train-images", "3"], "too few images"),
        (["--decays", "1"], "Invalid value"),
    ],
    ids=str,
)
def test_bad_options(arguments: list[str], part: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call(*figure(1, out, "--jobs", "1", *arguments))
    assert done.exit_code in (1, 2)
    assert part in done.stderr
    assert not out.exists()


def test_missing_scikit_learn_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    done = call(*figure(1, tmp_path / "out"))
    assert done.exit_code == 1
    assert 'pip install "manifold_sde[networks]"' in done.stderr
    assert not (tmp_path / "out").exists()
