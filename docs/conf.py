"""Sphinx, Furo and MyST; ``make docs`` builds with warnings as errors."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from django_jobs import __version__  # noqa: E402

project = "django_jobs"
author = "the django_jobs authors"
copyright = "2026, the django_jobs authors"
release = version = __version__

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "**/_*.md"]  # What begins with _ is included by a page.

html_theme = "furo"
html_title = f"django_jobs {release}"
html_show_sphinx = False
