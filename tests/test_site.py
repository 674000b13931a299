"""The site is made without a warning; its formulas are MathML, and drawn without a network."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from pydoc import locate

import pytest

pytest.importorskip("sphinx")
from docutils.utils.math import MathError
from linked_names import home_of
from native_mathematics import mathml, prepared
from plain_mathematics import docstring_as_rst

from tests.warm import ROOT, Program

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
IN_CODE = re.compile(r":math:`([^`]+)`|\.\. math::\n\n((?: {4,}\S.*\n)+)")


def test_every_formula_of_the_examples_is_written_as_mathml() -> None:
    """The site of these tests is made without them."""
    found = []
    for path in sorted((ROOT / "examples").glob("*.py")):
        for formula in IN_CODE.findall(path.read_text(encoding="utf-8")):
            found.append(mathml("".join(formula).replace("\n#", "\n").replace("\\\\", "\\")))
    assert not [made for made in found if "\\" in made]
    assert len(found) > 20


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


#: Makes a site as ``make docs`` does, but for the gallery, which takes minutes, and the navigation
#: beside each page and the index of the search, which take a third of the time.
MAKE = """
import gc, sys, warnings
from sphinx.builders.html import StandaloneHTMLBuilder
from sphinx.cmd.build import main

gc.disable()
warnings.simplefilter("ignore")  # of Python; those of Sphinx are the errors
StandaloneHTMLBuilder.search = False
source, site = sys.argv[1:]
options = ["-W", "--keep-going", "-q", "-b", "html", "-D", "html_theme=basic"]
sys.exit(main([*options, "-d", site + "-read", source, site]))
"""
CONF = f"""
__file__ = {str(ROOT / "docs" / "conf.py")!r}
exec(open(__file__, encoding="utf-8").read())
extensions.remove("sphinx_gallery.gen_gallery")
templates_path = [str(HERE / "_templates")]
html_static_path = [str(HERE / "_static")]
"""
DRAWN = re.compile(
    r"<(pre|code|math|script|style|title)\b.*?</\1>|<[^>]*>|class=\"[^\"]*\"", re.DOTALL
)


def made(folder: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The site of the pages in a folder, with warnings as errors."""
    (folder / "conf.py").write_text(CONF, encoding="utf-8")
    site = folder.parent / "site"
    # By the folder, so that a program finds the modules beside its pages.
    return site, Program("-c", MAKE, folder, site, folder=folder).wait()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The site of this project, and what was said when it was made."""
    folder = tmp_path_factory.mktemp("whole") / "docs"
    kept = shutil.ignore_patterns("_*", "conf.py", "gallery", "generated", "sg_*")
    shutil.copytree(ROOT / "docs", folder, ignore=kept)
    shutil.copytree(ROOT / "docs" / "_static", folder / "_static")
    shutil.copyfile(ROOT / "CHANGELOG.md", folder.parent / "CHANGELOG.md")  # pages include them
    (folder.parent / "manifold_sde").symlink_to(ROOT / "manifold_sde")
    (folder / "gallery").mkdir()
    (folder / "gallery" / "index.md").write_text("# Examples\n", encoding="utf-8")
    site, done = made(folder)
    return site, f"{done.stderr}{done.returncode}"


@pytest.mark.slow
def test_the_site_is_made_without_a_warning(whole: tuple[Path, str]) -> None:
    """All pages in Markdown, and the API: directives, headings, links, docstrings, formulas."""
    site, said = whole
    assert said == "0"
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} <= pages
    modules = [path for path in (ROOT / "manifold_sde").rglob("*.py") if path.stem[:2] != "__"]
    assert len([name for name in pages if name.startswith("generated/")]) >= len(modules)


def undrawn(page: str) -> list[str]:
    """What a reader sees of the source of formulas: all that is no code and no MathML."""
    text = DRAWN.sub("", page)
    return re.findall(r".*(?:\\\(|\\\[|\\[a-z]+\{|\$[^$\n]+\$).*", text)


def test_no_formula_is_left_as_it_was_written(whole: tuple[Path, str]) -> None:
    site, number = whole[0], 0
    for path in sorted(site.rglob("*.html")):
        page = path.read_text(encoding="utf-8")
        formulas = re.findall(r"<math\b.*?</math>", page, re.DOTALL)
        number += len(formulas)
        assert not [formula for formula in formulas if "\\" in formula], path
        assert not undrawn(page), path
        assert not re.findall(r"<(?:script|link)[^>]*(?:src|href)=\"(?:https?:)?//", page), path
    assert number > 1000


@pytest.mark.parametrize("left", [r"\(x\)", "$x$", r"<p>\frac{1}{2}</p>"])
def test_broken_twin_formula_that_is_left(left: str) -> None:
    assert undrawn(f"<p>{left} is half</p>")
    assert not undrawn(f"<p><math><mi>x</mi></math> costs $2, <code>{left}</code></p>")


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("```{nosuchdirective}\ntext\n```\n", "nosuchdirective"),
        ("[there](nowhere.md)\n", "nowhere.md"),
        ("$\\nosuchcommand x$\n", "nosuchcommand"),
        ("```{eval-rst}\n.. automodule:: broken\n```\n", "Inline literal start-string"),
    ],
    ids=["directive", "link", "formula", "docstring"],
)
def test_broken_twin_page(tmp_path: Path, page: str, said: str) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "broken.py").write_text('"""Text.\n\n- a\n  - b\n- c\n\nand ``more.\n"""\n')
    (folder / "index.md").write_text(f"# Title\n\n{page}", encoding="utf-8")
    _, done = made(folder)
    assert done.returncode != 0
    assert said in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no Chromium with its driver")
def test_a_browser_without_a_network_draws_every_formula(
    whole: tuple[Path, str], tmp_path: Path
) -> None:
    webdriver = pytest.importorskip("selenium.webdriver")
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
        driver.get((whole[0] / "mathematics.html").as_uri())
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
