"""Options of sphinx, for `make docs`."""

import re
import sys
import tomllib
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "python_api"))  # the reference is of this tree, built or not

project = "topd"
release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["topd.css"]
html_title = f"topd {release}"
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False

myst_heading_anchors = 3  # links to headings, as on GitHub
myst_enable_extensions = ["deflist"]

default_role = "code"  # docstrings write `name`
smartquotes_action = "D"  # dashes alone: quotes of "options" stay what can be copied
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_display_short_literal_types = True
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]  # fields of dataclasses as a list, also "rows, chunks: ..."
napoleon_use_rtype = False


def keep_ranges_whole(app: Sphinx, page: nodes.document) -> None:
    """Let no line of a table's cell end within "(1.74-1.85)" or "(+0.02 to +0.04)"."""

    def whole(match: re.Match[str]) -> str:
        return match[0].replace("-", "\N{NON-BREAKING HYPHEN}").replace(" ", "\N{NO-BREAK SPACE}")

    for cell in page.findall(nodes.entry):
        for text in list(cell.findall(nodes.Text)):
            text.parent.replace(text, nodes.Text(re.sub(r"\([+-]?[\d.,]+(-| to )[+-]?[\d.,]+\)", whole, text)))


def setup(app: Sphinx) -> None:
    """Leave overloads out: one signature a function, the one that has all of its types."""
    app.connect("doctree-read", keep_ranges_whole)
    analyze = ModuleAnalyzer.analyze

    def without_overloads(analyzer: ModuleAnalyzer) -> None:
        analyze(analyzer)
        analyzer.overloads = {}

    ModuleAnalyzer.analyze = without_overloads
