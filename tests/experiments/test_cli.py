"""The command line, in this process and as a process of its own, on a terminal of 80 columns."""

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

import manifold_sde
from manifold_sde.errors import ManifoldSDEError
from manifold_sde.experiments import cli
from manifold_sde.experiments.experiment import held_results
from manifold_sde.experiments.figure2 import Figure2
from manifold_sde.experiments.run_folder import Run
from manifold_sde.experiments.terminal import print_in_any_encoding
from tests.warm import Program

TINY = ["figure", "2", "--lr", "0.01", "--until", "0.03", "--runs", "4", "--law-runs", "8"]
STYLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")


def call(*arguments: str, catch: bool = True) -> Result:
    return CliRunner().invoke(cli.app, arguments, catch_exceptions=catch)


def process(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "manifold_sde", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, **options
    )  # type: ignore[call-overload]


def narrow(text: str) -> bool:
    return all(len(line) <= 80 for line in STYLE.sub("", text).splitlines())


def test_version() -> None:
    done = process("--version")
    assert (done.returncode, done.stdout) == (0, f"manifold-sde {manifold_sde.__version__}\n")


def commands(group: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The names of a group and of all below it, with what they are."""
    yield names, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, *names, name)


ALL = dict(commands(typer.main.get_command(cli.app)))


@pytest.mark.parametrize("names", ALL, ids=" ".join)
def test_help_fits_the_terminal_and_has_examples(names: tuple[str, ...]) -> None:
    done = call(*names, "-h")
    assert "Usage" in done.output
    assert narrow(done.output)
    assert "<bool>" not in done.output
    _, _, examples = done.output.partition("Examples:")
    assert examples.count("manifold-sde ") >= 2
    for param in ALL[names].params:
        shown = str(getattr(param, "show_default", ""))
        assert "form" not in shown, (param.name, shown)
        if names and getattr(param, "is_flag", False):
            assert param.secondary_opts, f"--{param.name} cannot be switched off"


def test_commands_are_in_the_order_of_use() -> None:
    listed = re.findall(r"^│ ([a-z]+) ", call("-h").output, re.MULTILINE)
    assert listed[:4] == ["info", "simulate", "verify", "audit"]
    figures = re.findall(r"^│ (\d) ", call("figure", "-h").output, re.MULTILINE)
    assert figures == ["1", "2", "3"]
    assert "Usage" in call().output


def test_every_figure_is_offered() -> None:
    text = call("figure", "-h").output
    for number in (1, 2, 3):
        assert f"Figure {number}:" in text
    assert call("figure", "4").exit_code == 2


def test_info(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("from manifold_sde import problems\nproblem = problems.great_circle()\n")
    done = call("info", f"{path}:problem")
    assert done.exit_code == 0
    assert "great circle" in done.output
    assert re.search(r"tr Σ at norm 1 +0\.18", done.output)
    assert narrow(done.output)


def test_errors_are_short_and_have_a_status(tmp_path: Path) -> None:
    done = Program("-m", "manifold_sde", "info", "nothing.py:problem", folder=tmp_path).wait()
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("Error: there is no such file\n  received: nothing.py\n")
    assert len(done.stderr.splitlines()) == 4


def test_other_errors_have_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ManifoldSDEError("it failed", remedy="another day")

    monkeypatch.setattr("manifold_sde.experiments.problem_file.load_problem", fail)
    done = call("info", "a.py:b")
    assert done.exit_code == 1
    assert "Error: it failed" in done.stderr


def test_interrupt_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("manifold_sde.experiments.figure2.command.simulate", stop)
    done = call(*TINY, "--out", str(tmp_path), "--jobs", "1", "--no-compile")
    assert done.exit_code == 130
    assert "goes on from here" in done.stderr


@pytest.mark.parametrize("resumable", [True, False])
def test_sigterm_ends_in_order_with_status_143(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, resumable: bool
) -> None:
    """What is under way ends by itself; without a handler the process would be gone at once."""
    ended: list[str] = []

    def stop(*_: object, **__: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            ended.append("in order")

    name = "figure2.command.simulate" if resumable else "problem_file.load_problem"
    monkeypatch.setattr(f"manifold_sde.experiments.{name}", stop)
    command = [*TINY, "--out", str(tmp_path), "--jobs", "1", "--no-compile"]
    done = call(*(command if resumable else ["info", "a.py:b"]))
    assert done.exit_code == 143
    assert ended == ["in order"]
    assert ("goes on from here" in done.stderr) is resumable
    assert "Stopped." in done.stderr
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_two_commands_do_not_make_the_same_results_at_once(tmp_path: Path) -> None:
    with held_results(Run(tmp_path), "figure2_quick"):
        done = call(*TINY, "--out", str(tmp_path), "--jobs", "1", "--no-compile")
        before = (tmp_path / "figure2_quick.toml").read_text()
    assert done.exit_code == 1
    assert f"in use by process {os.getpid()}" in done.stderr
    assert "finished = false" in before
    assert [path.name for path in tmp_path.iterdir()] == ["figure2_quick.toml"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = call(*TINY, "--out", str(tmp_path / "file"), "--jobs", "1", "--no-compile")
    assert done.exit_code == 1
    assert "Error: the file cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_names_do_not_rule_the_terminal(tmp_path: Path) -> None:
    """A name that clears the screen and turns the text round is spelled out."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from manifold_sde import Problem, SphericalNoise\n"
        "name = 'a\\x1b[2J\\x1b]0;title\\x07b\\u202ec'\n"
        "problem = Problem(lambda x: 0.5 * (x[2] / x.norm()) ** 2, 3, SphericalNoise(0.3), "
        "rank=1, name=name)\n"
    )
    done = call("info", f"{path}:problem")
    assert done.exit_code == 0
    assert r"a\x1b[2J\x1b]0;title\x07b\u202ec" in done.output
    assert not any(c in done.output for c in "\x1b\x07\u202e")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--lr", "0.01", "--lr", "0.01"], "do not make a Figure 2"),
        (["--lr", "-1"], "do not make a Figure 2"),
        (["--until", "0"], "do not make a Figure 2"),
        (["--until", "inf"], "do not make a Figure 2"),
        (["--law-runs", "3"], "Invalid value"),
        (["--seed", "-1"], "Invalid value"),
        (["--jobs", "3"], "Invalid value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(arguments: list[str], part: str, tmp_path: Path) -> None:
    done = call("figure", "2", "--out", str(tmp_path), "--no-compile", *arguments)
    assert done.exit_code == 2
    assert part in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.paper("Figure 2")
def test_figure_2_in_this_process(tmp_path: Path) -> None:
    done = call(*TINY, "--out", str(tmp_path / "new" / "folder"), "--jobs", "1", "--no-compile")
    assert done.exit_code == 0, done.output
    folder = tmp_path / "new" / "folder"
    files = sorted(path.name for path in folder.iterdir())
    assert files == [f"figure2_quick.{kind}" for kind in ("csv", "npz", "pdf", "png", "toml")]
    assert (folder / "figure2_quick.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "figure2_quick.pdf").read_bytes().startswith(b"%PDF")
    assert Figure2.load(folder / "figure2_quick.npz").run("gaussian", 0.01) is not None
    for part in ("x*, of norm 1", "gaussian", "orthogonal", "Watson", "figure 2 --full"):
        assert part in done.output
    paths = [line for line in done.output.splitlines() if line.startswith(str(tmp_path))]
    assert len(paths) == 4
    rest = [line for line in done.output.splitlines() if line not in paths]
    assert narrow("\n".join(rest))


@pytest.mark.slow
@pytest.mark.paper("Figure 2")
def test_figure_2_in_two_processes_is_the_same(tmp_path: Path) -> None:
    """To the bit; and the full form says nothing of a quick one."""
    environment = {**os.environ, "MPLBACKEND": "tkagg"}  # a backend of windows is not touched
    out = [str(tmp_path / name) for name in ("one", "two")]
    one = call(*TINY, "--full", "--out", out[0], "--jobs", "1", "--no-compile")
    two = process(*TINY, "--full", "--out", out[1], "--no-compile", env=environment)
    assert one.exit_code == 0, one.output
    assert two.returncode == 0, two.stderr
    assert "--full" not in two.stdout
    first, second = (Figure2.load(Path(folder) / "figure2.npz") for folder in out)
    for a, b in zip(first.runs, second.runs, strict=True):
        assert a.plan == b.plan
        assert a.angles.tobytes() == b.angles.tobytes()
        assert a.boxes.tobytes() == b.boxes.tobytes()


@pytest.mark.slow
def test_an_error_in_a_process_is_told(tmp_path: Path) -> None:
    arguments = ["figure", "2", "--lr", "200", "--until", "30", "--out", str(tmp_path)]
    arguments += ["--no-compile", "--runs", "4", "--law-runs", "8"]
    done = Program("-m", "manifold_sde", *arguments, folder=tmp_path).wait()
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("Error: ")


EVERYTHING = """
import sys
from manifold_sde.experiments import cli

FILE = "mine.py:problem"
RATES = ["--lr", "0.02", "--weight-decay", "0.05", "--steps", "5", "--paths", "2"]
for arguments in (
    ["info", FILE],
    ["verify", FILE, "--assumptions"],
    ["simulate", FILE, *RATES, "--compare-sgd"],
    ["figure", "2", "-h"],
    ["info", chr(0x3B7) + ".py:problem"],
):
    sys.argv = ["manifold-sde", *arguments]
    try:
        cli.main()
    except SystemExit as stop:
        print("status", stop.code or 0)
"""


@pytest.mark.parametrize(
    ("encoding", "environment"),
    [
        ("ascii", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
        ("cp1252", {"PYTHONIOENCODING": "cp1252"}),
    ],
)
def test_every_command_prints_in_any_encoding(
    encoding: str, environment: dict[str, str], tmp_path: Path
) -> None:
    text = """
from manifold_sde import problems
problem = problems.great_circle()
problem.name = "\u03b7-circle"
"""
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    environment = {**os.environ, **environment}
    if "PYTHONUTF8" in environment:  # which a Python looks for when it begins
        command = [sys.executable, "-c", EVERYTHING]
        begun = {"capture_output": True, "timeout": 300, "cwd": tmp_path, "env": environment}
        done = subprocess.run(command, check=False, encoding=encoding, **begun)
    else:
        program = Program("-c", EVERYTHING, folder=tmp_path, environment=environment)
        done = program.wait(encoding)
    shown, told = done.stdout, done.stderr
    assert "Traceback" not in told, told
    assert [line for line in shown.splitlines() if line.startswith("status")] == (
        ["status 0"] * 4 + ["status 2"]
    ), told
    for part in ("eta-circle", "dim of Gamma", "Usage"):
        assert part in shown
    assert "received: eta.py" in told
    table = [line for line in shown.splitlines() if "+-" in line and " 5 " in line[:8]]
    lines = shown.splitlines()
    heads = [lines[k - 2] for k, line in enumerate(lines) if line in table]
    if encoding == "ascii":  # columns are laid out as the signs are spelled
        assert table
        assert all(len(head) == len(row) for head, row in zip(heads, table, strict=True))
    (page,) = tmp_path.glob("results/*/verify_mine_problem.html")
    assert "\u03b7-circle" in page.read_text(encoding="utf-8")
    (picture,) = tmp_path.glob("results/*/simulate_mine_problem.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_signs_that_an_encoding_lacks_are_spelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """And without this they are refused."""
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    with pytest.raises(UnicodeEncodeError):
        plain.write("\u03b7")
    monkeypatch.setattr(sys, "stdout", plain)
    print_in_any_encoding()
    plain.write("\u03b7|x|\u00b2 \u00b1 1, \u0393\u2081, \u65e5\n")
    plain.flush()
    assert plain.buffer.getvalue() == b"eta|x|^2 +- 1, Gamma_1, ?\n"  # type: ignore[attr-defined]


def test_a_reference_is_written_and_checked(tmp_path: Path) -> None:
    done = call("reference", "great_circle", "--draws", "200", "--out", str(tmp_path))
    assert done.exit_code == 0
    assert "great_circle: 200 draws" in done.output
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".npz", ".toml"}
    file = tmp_path / "great_circle.npz"
    again = call("reference", "great_circle", "--check", str(file))
    assert again.exit_code == 0
    assert "great_circle: passed" in again.output
    assert narrow(again.output)
    # The same states are not those of another entry, and of no entry at all.
    assert call("reference", "varying_circle", "--check", str(file)).exit_code == 0
    assert call("reference", "great_sphere", "--check", str(file)).exit_code == 2
    assert call("reference", "--check", str(file)).exit_code == 2
    np.save(tmp_path / "wrong.npy", 1.1 * np.load(file)["states"])
    wrong = call("reference", "great_circle", "--check", str(tmp_path / "wrong.npy"))
    assert wrong.exit_code == 1
    assert "FAILS" in wrong.output
    assert call("reference", "great_circle", "--out", str(tmp_path)).exit_code == 2


@pytest.mark.parametrize(
    ("words", "found"), [("sim", "simulate"), ("simulate --com", "--compare-sgd")]
)
def test_a_shell_completes_commands_and_options(words: str, found: str) -> None:
    env = {"COMP_WORDS": f"manifold-sde {words}", "COMP_CWORD": str(len(words.split()))}
    env["_MANIFOLD_SDE_COMPLETE"] = "complete_bash"
    done = CliRunner().invoke(cli.app, [], env=env, prog_name="manifold-sde")
    assert done.output.split() == [found]


def test_the_command_has_one_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By ``python -m`` too: what --show-completion prints is for this name."""
    monkeypatch.setattr(sys, "argv", [str(Path(manifold_sde.__file__, "../__main__.py")), "-h"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "Usage: manifold-sde [OPTIONS]" in capsys.readouterr().out
