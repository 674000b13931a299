"""Configuration of the documentation: ``make docs``."""

import doctest
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

project = "manifold_sde"
author = "the manifold_sde authors"
project_copyright = author
release = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "version"
]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx_gallery.gen_gallery",
    "exports",
    "linked_names",
    "native_mathematics",
    "plain_mathematics",
    "shallow_contents",
]
exclude_patterns = ["_build", "gallery/*.ipynb", "gallery/*.py", "gallery/*.md5"]
templates_path = ["_templates"]

html_theme = "furo"
html_title = f"manifold_sde {release}"
html_static_path = ["_static"]
html_math_renderer = "native"  # MathJax would come from the network
html_css_files = ["tables.css"]

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

# One page a module, found by walking the package (docs/_templates/autosummary/module.rst).
autosummary_generate = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_default_options = {
    "members": True,
    "show-inheritance": True,
    "ignore-module-all": True,  # what a package imports is documented where it is defined
}
autodoc_use_type_comments = False  # there are none, and looking for them takes long
napoleon_google_docstring = False  # plain_mathematics.py reads them
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# The doctest builder runs what is on the pages; the docstrings are also run by pytest.
doctest_global_setup = "import torch; import manifold_sde"
doctest_default_flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS  # those of pytest

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": "plot_",
    "abort_on_example_error": False,
    "download_all_examples": False,
    "min_reported_time": 1,
    "show_memory": False,
}
