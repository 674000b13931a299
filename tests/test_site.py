"""The site's mathematics: every formula is written as MathML, and drawn without a network."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc import locate

import pytest

pytest.importorskip("sphinx")
from docutils.utils.math import MathError
from linked_names import home_of
from native_mathematics import mathml, prepared
from plain_mathematics import docstring_as_rst

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
IN_PAGES = re.compile(r"\$\$(.+?)\$\$|(?<![\\$])\$(?=\S)([^$]+?)(?<=\S)\$(?!\d)", re.DOTALL)
IN_CODE = re.compile(r":math:`([^`]+)`|\.\. math::\n\n((?: {4,}\S.*\n)+)")


def formulas() -> Iterator[tuple[str, str]]:
    """File and formula, of all pages, docstrings and examples."""
    for path in sorted((ROOT / "docs").glob("*.md")):
        for found in IN_PAGES.findall(CODE.sub("", path.read_text(encoding="utf-8"))):
            yield path.name, "".join(found)
    for folder in ("manifold_sde", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for found in IN_CODE.findall(path.read_text(encoding="utf-8")):
                yield path.name, "".join(found).replace("\n#", "\n").replace("\\\\", "\\")


def test_every_formula_is_written_as_mathml() -> None:
    faults, number = [], 0
    for name, formula in formulas():
        number += 1
        try:
            made = mathml(formula)
        except MathError as error:
            faults.append(f"{name}: {formula}: {error}")
        else:
            assert "\\" not in made, (name, formula)
    assert not faults, "\n".join(faults)
    assert number > 800


def test_broken_twin_formula() -> None:
    with pytest.raises(MathError):
        mathml(r"\nosuchcommand x")


@pytest.mark.parametrize(
    ("tex", "wanted"),
    [
        (r"\tfrac12 s^2", r"{\tfrac{1}{2}} s^2"),
        (r"\frac1{2c}", r"{\frac{1}{2c}}"),
        (r"\frac{\frac12}\lambda", r"{\frac{{\frac{1}{2}}}{\lambda}}"),
        (r"\barrier", r"\barrier"),
    ],
)
def test_arguments_get_their_braces(tex: str, wanted: str) -> None:
    assert prepared(tex) == wanted


def test_an_index_of_an_accent_stands_beside_it() -> None:
    """The converter alone puts it below."""
    assert "<msub>" in mathml(r"\bar Y_C")
    assert "munder" not in mathml(r"\bar Y_C")


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no Chromium with its driver")
def test_a_browser_without_a_network_draws_every_formula(tmp_path: Path) -> None:
    webdriver = pytest.importorskip("selenium.webdriver")
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    shutil.copyfile(ROOT / "docs" / "mathematics.md", source / "index.md")
    (source / "conf.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'docs' / '_ext')!r})\n"
        "extensions = ['myst_parser', 'native_mathematics']\n"
        "html_math_renderer = 'native'\n"
        "myst_enable_extensions = ['amsmath', 'dollarmath']\n"
        "html_static_path = []\n"
        "suppress_warnings = ['myst.xref_missing']\n"
    )
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", str(source), str(site)]
    subprocess.run(build, check=True)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(executable_path=DRIVER))
    try:
        driver.get((site / "index.html").as_uri())
        text = driver.find_element("tag name", "body").text
        sizes = driver.execute_script(
            "return [...document.querySelectorAll('math')].map(m => m.getBoundingClientRect())"
            ".map(box => [box.width, box.height])"
        )
    finally:
        driver.quit()
    assert not [sign for sign in (r"\(", r"\[", r"\frac", "$") if sign in text]
    assert len(sizes) > 200
    assert all(width > 3 and height > 3 for width, height in sizes)
    page = (site / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r"<(?:script|link)[^>]*(?:src|href)=\"(?:https?:)?//", page)


#: What a page can be read without: the pages of the API take a minute to make, the gallery several.
_WITHOUT = ("autodoc", "autosummary", "doctest", "gallery", "_names", "plain_", "shallow")


def docstrings_of(module: Path) -> Iterator[tuple[str, str]]:
    """The docstrings of a module, as reStructuredText, with where they are."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            name = getattr(node, "name", "the module")
            yield f"{module.name}, {name}", docstring_as_rst(ast.get_docstring(node) or "", name)


def write_docstrings(folder: Path, modules: list[Path]) -> None:
    """Write a page for each module, with its docstrings as the site has them."""
    for module in modules:
        parts = [f"Of ``{place}``:\n\n{text}\n" for place, text in docstrings_of(module)]
        page = folder / f"{len([*folder.iterdir()])}_{module.stem}.rst"
        page.write_text(f":orphan:\n\nModule\n======\n\n{chr(10).join(parts)}", encoding="utf-8")


def pages_of(folder: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Read all pages by Sphinx, with warnings as errors, but for the API and the gallery."""
    conf = tmp_path / "conf.py"
    conf.write_text(
        f"__file__ = {str(ROOT / 'docs' / 'conf.py')!r}\n"
        "exec(open(__file__, encoding='utf-8').read())\n"
        f"extensions = [e for e in extensions if not any(w in e for w in {_WITHOUT!r})]\n"
        "exclude_patterns = [*exclude_patterns, 'api', 'gallery', 'generated', 'sg_*']\n"
        "html_static_path = []\n"
        "suppress_warnings = ['toc.excluded', 'toc.not_readable', 'myst.xref_missing']\n"
    )
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "dummy"]
    command += ["-c", str(tmp_path), "-d", str(tmp_path / "read"), str(folder)]
    return subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True)


def test_the_pages_are_read_without_a_warning(tmp_path: Path) -> None:
    """Directives, tables, headings, glossary and mathematics of all pages in Markdown."""
    done = pages_of(ROOT / "docs", tmp_path)
    assert done.returncode == 0, done.stderr


def test_broken_twin_a_page_with_a_directive_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Title\n\n```{nosuchdirective}\ntext\n```\n")
    done = pages_of(tmp_path / "docs", tmp_path)
    assert done.returncode != 0
    assert "nosuchdirective" in done.stderr


def test_docstrings_are_read_without_a_warning(tmp_path: Path) -> None:
    """All of the package, as the site's pages of the API have them, but for what Python adds."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.rst").write_text("Title\n=====\n")
    write_docstrings(tmp_path / "docs", sorted((ROOT / "manifold_sde").rglob("*.py")))
    done = pages_of(tmp_path / "docs", tmp_path)
    assert done.returncode == 0, done.stderr


def test_broken_twin_a_docstring_with_a_list_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.rst").write_text("Title\n=====\n")
    (tmp_path / "broken.py").write_text('"""Text.\n\n- a\n  - b\n- c\n\nand ``more.\n"""\n')
    write_docstrings(tmp_path / "docs", [tmp_path / "broken.py"])
    done = pages_of(tmp_path / "docs", tmp_path)
    assert done.returncode != 0
    assert "Inline literal start-string" in done.stderr


def test_a_colon_ends_no_type_and_names_share_a_description() -> None:
    attribute = docstring_as_rst("A point or points: a tensor.", "Points", "data")
    assert attribute == "A point or points: a tensor.\n"
    shared = docstring_as_rst("Text.\n\nArgs:\n    a, b: The ends.\n", "f")
    assert ":param a: The ends.\n:param b: The ends.\n" in shared


def test_names_in_pages_lead_to_where_they_are_defined() -> None:
    name = re.compile(r"`(manifold_sde(?:\.\w+)+)`")
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")]
    named = {found for text in pages for found in name.findall(text)}
    assert len(named) > 80
    assert not [found for found in named if locate(found) is None]
    assert locate("manifold_sde.solvers.nothing") is None
    assert home_of("manifold_sde.solvers.solve") == "manifold_sde.solvers.solver.solve"
