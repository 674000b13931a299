"""Problems named FILE.py:NAME, and what is said where that fails."""

from pathlib import Path

import pytest

from manifold_sde.errors import ArgumentError
from manifold_sde.experiments.problem_file import load_problem

GOOD = """
from beside import SCALE
from manifold_sde import Problem, SphericalNoise, problems

def loss(x):
    return 0.5 * (x[2] / x.norm()) ** 2

problem = Problem(loss, 3, SphericalNoise(SCALE), name="mine")

def make():
    return problems.great_sphere(5)

def needs(argument):
    return problem

def wrong():
    return Problem(loss, 1, SphericalNoise(SCALE))

number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_problem.py"
    path.write_text(GOOD)
    (tmp_path / "beside.py").write_text("SCALE = 0.25\n")
    return path


def test_a_problem_and_a_function_that_makes_one(file: Path) -> None:
    assert load_problem(f"{file}:problem").name == "mine"
    assert load_problem(f"{file}:make").dim == 5


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("my_problem.py", ["not named by a file and a name", "my_problem.py:problem"]),
        ("my_problem.py:", ["not named by a file and a name"]),
        (":problem", ["not named by a file and a name"]),
        ("my_problem.py:a.b", ["not named by a file and a name"]),
        ("my_problm.py:problem", ["no such file", "did you mean my_problem.py?"]),
        ("nowhere/x.py:problem", ["no such file", "no folder nowhere"]),
        (".:problem", ["no such file", "a folder"]),
        ("notes.txt:problem", ["not a Python file"]),
        ("my_problem.py:problme", ["no 'problme'", "did you mean problem?"]),
        ("my_problem.py:zzz", ["no 'zzz'", "problems in it: problem"]),
        ("my_problem.py:number", ["not a problem", "int", "problems in it: problem"]),
        ("my_problem.py:needs", ["needs raised", "TypeError", "without arguments"]),
        ("my_problem.py:wrong", ["wrong raised", "dim is not", "line 17"]),
        ("empty.py:problem", ["no 'problem'", "no Problem among its names"]),
        ("broken.py:problem", ["cannot be run", "ValueError in line 2", "no such luck"]),
        ("syntax.py:problem", ["cannot be run", "SyntaxError in line 1"]),
        ("imports.py:problem", ["cannot be run", "ModuleNotFoundError in line 1"]),
    ],
)
def test_what_is_said(
    target: str, parts: list[str], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    Path("notes.txt").write_text("")
    Path("empty.py").write_text("")
    Path("broken.py").write_text("x = 1\nraise ValueError('no such luck')\n")
    Path("syntax.py").write_text("def\n")
    Path("imports.py").write_text("import no_such_module_at_all\n")
    with pytest.raises(ArgumentError) as caught:
        load_problem(target)
    for part in parts:
        assert part in str(caught.value)
