"""The registry of the paper's statements, and the markers of the tests."""

import pickle
from pathlib import Path

import pytest
from marked_tests import marked_tests, marked_twins

from manifold_sde.errors import ArgumentError
from manifold_sde.paper import STATEMENTS, implementations, implements
from tests.warm import Program

TESTS = Path(__file__).parent

NUMBERED = {
    "Conjecture": ["1.1"],
    "Assumption": ["2.1", "2.3", "5.1", "5.2", "5.3"],
    "Definition": ["2.2", "2.6", "2.9"],
    "Lemma": ["2.4", "2.5", "2.7", "2.8", "3.1", "4.3"],
    "Theorem": ["1.2", "2.10", "3.2", "4.1", "4.4", "5.4", "5.5"],
    "Remark": ["3.3", "4.2", "6.1"],
    "Equation": [f"({number})" for number in range(1, 20)],
    "Figure": ["1", "2", "3"],
}


def test_statements_are_complete() -> None:
    expected = {f"{kind} {number}" for kind, numbers in NUMBERED.items() for number in numbers}
    assert set(STATEMENTS) == expected


def test_statements_have_section_and_one_line() -> None:
    for name, statement in STATEMENTS.items():
        number = name.split()[1]
        if number[0].isdigit() and not name.startswith("Figure"):
            assert statement.section.split(".")[0] == number.split(".")[0], name
        assert statement.summary
        assert len(statement.summary) <= 80, name


def test_markers_name_statements_of_the_paper() -> None:
    unknown = {name: tests for name, tests in marked_tests(TESTS).items() if name not in STATEMENTS}
    assert not unknown


def test_every_implementation_has_a_marked_test() -> None:
    tests = marked_tests(TESTS)
    violators = {
        statement: names
        for statement, names in implementations().items()
        if names and statement not in tests
    }
    assert not violators, f"implemented, but no test is marked with it: {violators}"


def test_implementations_are_public_and_in_the_papers_order() -> None:
    found = implementations()
    assert list(found) == list(STATEMENTS)
    names = {name for names in found.values() for name in names}
    private = [name for name in names if any(part.startswith("_") for part in name.split("."))]
    assert not private


def test_implements_returns_the_object_itself() -> None:
    def function() -> int:
        return 1

    before = dict(vars(function))
    assert implements("Lemma 2.4")(function) is function
    assert vars(function) == before

    class Thing:
        @property
        @implements("Lemma 2.4")
        def value(self) -> int:
            return 2

        @staticmethod
        @implements("Lemma 2.4")
        def twice(x: int) -> int:
            return 2 * x

    assert implements("Lemma 2.5", "Equation (1)")(Thing) is Thing
    assert Thing().value == 2
    assert Thing.twice(2) == 4


def test_implementations_list_objects_of_the_package_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def outside() -> None: ...

    def inside() -> None: ...

    inside.__module__ = "manifold_sde.somewhere"
    inside.__qualname__ = "Thing.inside"
    implementations()  # so that no module is imported, and recorded, while the record is ours
    record: dict[str, set[str]] = {name: set() for name in STATEMENTS}
    monkeypatch.setattr("manifold_sde.paper._implementers", record)
    implements("Figure 3")(outside)
    implements("Figure 3")(inside)
    implements("Figure 3")(inside)
    assert implementations()["Figure 3"] == ["manifold_sde.somewhere.Thing.inside"]


@pytest.mark.parametrize(
    ("name", "guess"),
    [("Lemma 2.70", "Lemma 2.7"), ("(8)", "Equation (8)"), ("zebra", "STATEMENTS")],
)
def test_unknown_statement_is_refused(name: str, guess: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        implements("Lemma 2.7", name)
    assert caught.value.received == repr(name)
    assert guess in caught.value.remedy
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_no_statement_and_no_name_are_refused() -> None:
    with pytest.raises(ArgumentError, match="needs the names"):
        implements()
    with pytest.raises(ArgumentError, match="below @property"):
        implements("Lemma 2.7")(property(lambda self: 1))


def test_implementations_skip_a_module_whose_dependency_is_missing(tmp_path: Path) -> None:
    """In a package that has a module with a missing dependency; a real failure is not hidden."""
    code = """
import sys, manifold_sde
manifold_sde.__path__.append(sys.argv[1])
from manifold_sde.paper import implementations
assert isinstance(implementations(), dict)
"""
    run = ["-c", code, tmp_path]
    (tmp_path / "extra_one.py").write_text("import a_library_that_is_not_there\n")
    assert Program(*run).wait().returncode == 0
    (tmp_path / "extra_two.py").write_text("import manifold_sde.not_there\n")
    failed = Program(*run).wait()
    assert "manifold_sde.not_there" in failed.stderr


SYNTHETIC = """
import pytest
pytestmark = [pytest.mark.paper("Figure 1")]

@pytest.mark.paper("Lemma 2.7", "Equation (8)")
def test_one(): ...

@pytest.mark.paper("Lemma 2.7")
class TestTwo:
    @pytest.mark.parametrize("x", [pytest.param(1, marks=pytest.mark.paper("Lemma 9.9"))])
    def test_three(self, x): ...
"""


def test_the_scan_finds_each_marker_where_it_stands(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "test_it.py").write_text(SYNTHETIC)
    file = "sub/test_it.py"
    assert marked_tests(tmp_path) == {
        "Figure 1": [file],
        "Lemma 2.7": [f"{file}::test_one", f"{file}::TestTwo"],
        "Equation (8)": [f"{file}::test_one"],
        "Lemma 9.9": [f"{file}::TestTwo::test_three"],
    }


def test_the_scan_refuses_a_marker_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("import pytest\nM = pytest.mark.paper(NAME)\n")
    with pytest.raises(ValueError, match=r"test_it\.py:2: NAME is not a string"):
        marked_tests(tmp_path)


def test_the_scan_of_twins_reads_names_that_the_file_gives_to_strings(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        'import pytest\nA = "a check"\n@pytest.mark.twin(A, "broken")\ndef test_one(): ...\n'
        '@pytest.mark.twin("a check", "broken otherwise")\ndef test_two(): ...\n'
    )
    assert marked_twins(tmp_path) == {
        "a check": {
            "broken": ["test_it.py::test_one"],
            "broken otherwise": ["test_it.py::test_two"],
        }
    }
    (tmp_path / "test_it.py").write_text('import pytest\nM = pytest.mark.twin("a check")\n')
    with pytest.raises(ValueError, match="the name of a check, and what is broken"):
        marked_twins(tmp_path)
