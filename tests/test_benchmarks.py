"""The benchmarks run, give rows that can be read, and refuse peers that compute something else."""

import json
import math
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import (
    __main__,
    bench_bound,
    bench_brownian,
    bench_cold,
    bench_diffusion,
    bench_limit_map,
    bench_limits,
    bench_multilevel,
    bench_network,
    bench_one_path,
    bench_peers,
    bench_reference,
    bench_sampling,
    bench_second_derivative,
    bench_sgd,
    bench_symbolic,
    bench_training,
    bench_verify,
    network_problems,
    rows,
)
from benchmarks.bench_sgd import LR, WEIGHT_DECAY, EagerTorch, check_peer
from benchmarks.rows import Row, Timing, in_turns
from manifold_sde import Geometry, Problem, SamplingNoise, problems
from manifold_sde.compile import c_compiler
from manifold_sde.compile.compiler import compile_points

MODULES = {
    "sgd": bench_sgd,
    "second_derivative": bench_second_derivative,
    "bound": bench_bound,
    "symbolic": bench_symbolic,
    "limit_map": bench_limit_map,
    "brownian": bench_brownian,
    "diffusion": bench_diffusion,
    "network": bench_network,
    "peers": bench_peers,
    "verify": bench_verify,
    "limits": bench_limits,
    "multilevel": bench_multilevel,
    "cold": bench_cold,
    "training": bench_training,
    "one_path": bench_one_path,
    "sampling": bench_sampling,
    "reference": bench_reference,
}
needs_jax = pytest.mark.skipif(not rows.installed("jax"), reason="no JAX (make bench-environment)")
STEPS = 40


def assert_well_formed(found: list[Row]) -> None:
    """Positive finite numbers, a ratio that fits them, and a line of at most 80 columns."""
    assert len(found) >= 1
    for row in found:
        assert all(math.isfinite(v) and v > 0 for v in (row.ours, row.peer, row.ratio))
        if row.low is None or row.high is None:
            assert row.ratio == pytest.approx(row.ours / row.peer)
        else:
            assert row.low <= row.ratio <= row.high
        assert len(__main__.line(row)) <= 80
        assert row.met is (None if row.target is None else row.ratio <= row.target)


@pytest.mark.parametrize("name", MODULES)
def test_quick_form_gives_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without JAX, whose compiling takes longest; its peers have tests of their own."""
    module = MODULES[name]
    if "jax" in module.PEERS:
        monkeypatch.setattr(module, "installed", lambda package: False)
    found = module.rows(quick=True)
    assert_well_formed(found)
    assert len(module.TITLE) <= 80
    if name == "symbolic":
        assert len(found) == 4


def test_benchmarks_that_are_listed_are_there() -> None:
    files = Path(__main__.__file__).parent.glob("bench_*.py")
    assert set(MODULES) == set(__main__.NAMES)
    assert set(MODULES) <= {file.stem.removeprefix("bench_") for file in files}


@pytest.mark.skipif(c_compiler() is None, reason="no C compiler")
def test_operations_of_kernels_are_counted() -> None:
    """(x - y)^2 summed over three: subtractions, products, and two additions, for each point."""
    x, y = torch.rand(2, 3, 7, dtype=torch.float64)
    with bench_bound.counted() as total:
        kernel = compile_points(lambda a, b: ((a - b) * (a - b)).sum(), (x, y))
        assert kernel is not None
        before = total()
        kernel(x, y)
        assert total() - before == 8 * 7


# Peers that compute something else.


def peer(scale: float = 0.3, weight_decay: float = WEIGHT_DECAY, n_paths: int = 256) -> EagerTorch:
    problem = problems.normalized_linear(noise_scale=scale)
    return EagerTorch(problem, LR, weight_decay, n_paths, STEPS)


@pytest.fixture(scope="module")
def ours() -> Tensor:
    return bench_sgd.our_end(problems.normalized_linear(), 256, STEPS, 0, compiled=False)


def test_the_eager_peer_computes_the_same(ours: Tensor) -> None:
    check_peer(problems.normalized_linear(), peer(), ours)


@needs_jax
@pytest.mark.parametrize("form", ["vmap(grad)", "batched by hand"])
def test_the_jax_peer_computes_the_same(
    form: str, ours: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import jax_peers

    monkeypatch.setattr(jax_peers, "_fastest", lambda candidates, repeats: form)
    problem = problems.normalized_linear()
    check_peer(problem, jax_peers.Sgd(problem, LR, WEIGHT_DECAY, 256, STEPS), ours)
    twin = jax_peers.Sgd(problem, LR, 2 * WEIGHT_DECAY, 256, STEPS)
    with pytest.raises(AssertionError, match="not close"):
        check_peer(problem, twin, ours)


@needs_jax
@pytest.mark.parametrize("form", ["forward mode", "gradient of a trace"])
def test_the_second_derivative_in_jax_is_the_same(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import jax_peers

    monkeypatch.setattr(jax_peers, "_fastest", lambda candidates, repeats: form)
    problem, y, sigma = bench_second_derivative.setting(3)
    row = bench_second_derivative._against_jax(problem, y, sigma, False, 1)
    assert_well_formed([row])
    assert form in row.note
    monkeypatch.setattr(bench_second_derivative.Geometry, "second_derivative", lambda *_: y)
    with pytest.raises(AssertionError, match="not close"):
        bench_second_derivative._against_jax(problem, y, sigma, False, 1)


@pytest.mark.parametrize(
    "twin", [peer(weight_decay=1.001 * WEIGHT_DECAY), peer(scale=0.3001)], ids=["decay", "noise"]
)
def test_broken_twin_of_a_step(twin: EagerTorch, ours: Tensor) -> None:
    with pytest.raises(AssertionError, match="not close"):
        check_peer(problems.normalized_linear(), twin, ours)


class Repeated(EagerTorch):
    """Right steps, but the same noise in each."""

    def end(self, seed: int) -> Tensor:
        x = self._start
        normals = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
        for _ in range(STEPS):
            x = self.step(x, normals)
        return x


class Common(EagerTorch):
    """Right steps, but one noise for all paths."""

    def end(self, seed: int) -> Tensor:
        x, generator = self._start, torch.Generator().manual_seed(seed)
        for _ in range(STEPS):
            x = self.step(x, torch.randn(x.shape[1], generator=generator).to(x).expand_as(x))
        return x


class Shorter(EagerTorch):
    """Right steps, but a tenth of them missing."""

    def end(self, seed: int) -> Tensor:
        self._steps = STEPS - STEPS // 10
        return super().end(seed)


class Undefined(EagerTorch):
    """Right steps, but the runs blow up."""

    def end(self, seed: int) -> Tensor:
        return super().end(seed) * torch.nan


@pytest.mark.parametrize("twin", [Repeated, Common, Shorter, Undefined])
def test_broken_twin_of_a_run(twin: type[EagerTorch], ours: Tensor) -> None:
    problem = problems.normalized_linear()
    with pytest.raises(AssertionError, match="another law"):
        check_peer(problem, twin(problem, LR, WEIGHT_DECAY, 256, STEPS), ours)


def test_broken_twins_of_functions() -> None:
    x = torch.linspace(0.5, 2.0, 12, dtype=torch.float64).reshape(4, 3)
    assert bench_symbolic.compare(lambda z: z, lambda z: z * (1 + 1e-12), x, 1).ratio > 0
    with pytest.raises(AssertionError, match="not close"):
        bench_symbolic.compare(lambda z: z, lambda z: z * (1 + 1e-8), x, 1)
    with pytest.raises(AssertionError, match="not close"):
        bench_second_derivative.check_same(x * (1 + 1e-8), x)


def test_a_peer_with_another_network_or_other_samples_is_refused() -> None:
    module = bench_one_path.mlp(2).double()
    inputs, targets = torch.rand(40, 1, 28, 28).double(), torch.arange(40) % 10
    problem = Problem.from_module(
        module, torch.nn.CrossEntropyLoss(), inputs, targets, SamplingNoise(bench_one_path.BATCH)
    )
    x = problem.vector(module)
    bench_one_path.check_same(problem, x, bench_one_path.Torch(module, inputs, targets))
    other = bench_one_path.Torch(module, inputs.flip(0), targets)
    with pytest.raises(AssertionError, match="not close"):
        bench_one_path.check_same(problem, x, other)


def test_a_solver_that_stays_inaccurate_is_refused() -> None:
    setting = bench_limit_map.linear_model(0, 2, "orthogonal")
    with pytest.raises(AssertionError, match="error"):
        bench_limit_map.loosest(lambda s, rtol: (s.exact * [1 + 1e-6] + 1e-6, 1.0), setting)


# Timing and the table.


def test_ratios_are_those_of_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours takes 2, 6, 4 s, the peer 1, 2, 4 s: ratios 2, 3 and 1."""
    now = 0.0
    waits = {"ours": iter([0, 2, 6, 4]), "peer": iter([0, 1, 2, 4])}

    def call(name: str) -> None:
        nonlocal now
        now += next(waits[name])

    clock = types.SimpleNamespace(perf_counter=lambda: now, process_time=lambda: now)
    monkeypatch.setattr(rows, "time", clock)
    timing = in_turns(lambda: call("ours"), lambda: call("peer"), 3)
    assert timing == Timing(4.0, 2.0, 2.0, 1.0, 3.0)
    row = timing.row("name", "peer", per=2, target=2.0)
    assert (row.ours, row.unit, row.ratio, row.met) == (2e6, "µs", 2.0, True)
    clock.process_time = lambda: 1.9 * now
    waits = {"ours": iter([0, 1]), "peer": iter([0, 1])}
    with pytest.raises(AssertionError, match=r"1\.90 cores"):
        in_turns(lambda: call("ours"), lambda: call("peer"), 1)


ROW = Row("sixty paths", 1234.5, 1000.0, "somebody", "µs", 1.2345, 1.15, "noted", 1.1, 1.4)


def test_a_missed_target_is_said_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_sgd, "rows", lambda quick: [ROW])
    monkeypatch.setattr(bench_sgd, "PEERS", ("a_package_that_nobody_has",))
    assert __main__.main(["sgd"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    shown = next(text for text in out.splitlines() if text.startswith("sixty"))
    assert shown.replace(" ", "") == "sixtypaths12341000µssomebody1.231.15MISSED"
    assert "noted; ratio in single rounds 1.1 to 1.4" in out
    assert "a_package_that_nobody_has is not installed" in out
    assert "make bench-environment" in " ".join(out.split())
    written = json.loads((tmp_path / "results" / "benchmarks.json").read_text(encoding="utf-8"))
    assert written["rows"]["sgd"][0]["met"] is False
    assert written["rows"]["sgd"][0]["ratio"] == 1.2345
    assert written["machine"]["cores"] >= 1
    assert {"python", "torch"} <= written["versions"].keys()


def test_a_benchmark_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(quick: bool) -> list[Row]:
        raise AssertionError("they compute different things")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_sgd, "rows", fail)
    monkeypatch.setattr(bench_symbolic, "rows", lambda quick: [ROW])
    assert __main__.main(["sgd", "symbolic"]) == 1
    printed = capsys.readouterr()
    assert "FAILED" in printed.out
    assert "sixty paths" in printed.out
    assert "they compute different things" in printed.err


def test_a_benchmark_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        __main__.main(["sde"])
    assert "no benchmark 'sde'" in capsys.readouterr().err


def test_a_projection_that_is_none_is_refused() -> None:
    problem, y = network_problems.network("1k", 3)
    v = y.flip(0)
    right = Geometry(problem, "matrix_free").projector(y)(v)
    bench_network.check_projection(problem, y, v, right)
    with pytest.raises(AssertionError):
        bench_network.check_projection(problem, y, v, right + 1e-8 * v)
