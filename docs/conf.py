"""Settings of the documentation site: pages in MyST Markdown, API pages from the docstrings."""

import importlib.metadata
import typing
from importlib.util import find_spec

import numpy.typing

# Shown by its name, not as the union that it is; it has to be set before the package is imported.
numpy.typing.ArrayLike = typing.NewType("ArrayLike", object)

project = "coreinfer_jax"
version = release = importlib.metadata.version("coreinfer_jax")
html_title = f"coreinfer_jax {release}"
html_theme = "furo"
html_show_copyright = False

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
myst_heading_anchors = 3
# The prompt sign of a console block is no part of the command that the button copies.
copybutton_prompt_text = "$ "

# `name` in a docstring is code, and a link where the name is documented.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# Of an extra; where it is missing, one class lacks its signature.
autodoc_mock_imports = [] if find_spec("lm_eval") else ["lm_eval"]
napoleon_numpy_docstring = False
# Attributes stand in one list, as in the docstring.
napoleon_use_ivar = True
