"""
Every ```python block of the README and of docs/ runs.

A page is one program: its blocks run in order in one namespace, inside a transaction that is rolled back.
A ``test_...`` function on a page is a test: called as pytest would, on its own, with the fixtures it names.
A ``TestCase`` on a page is run as Django would run it.
"""

import inspect
import re
import sys
import types
import unittest
from pathlib import Path

import pytest
from django.db import transaction

from django_jobs import conf, registry

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
TEST = re.compile(r"^(?:def (?=test_)|class (?=\w+\(TestCase\)))(\w+)", re.MULTILINE)
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in FILES if BLOCK.search(page.read_text())]
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
#: Each page, and each page once more for every test in it.
CASES = [
    pytest.param(page, name, id=":".join(filter(None, [str(page.relative_to(ROOT)), name])))
    for page in PAGES
    for name in ["", *TEST.findall(page.read_text())]
]


@pytest.fixture
def module(monkeypatch, request):
    """A module for the page's code; the jobs it declares are forgotten afterwards."""
    name = "docs_" + re.sub(r"\W", "_", str(request.node.callspec.id))
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(registry, "_jobs", dict(registry._jobs))
    monkeypatch.setattr(registry, "_by_event", None)
    return module


def run(page: Path, module: types.ModuleType) -> None:
    text = page.read_text()
    for block in BLOCK.finditer(text):
        # Blank lines in front, so that a traceback names the line of the page.
        source = "\n" * text.count("\n", 0, block.start(1)) + block[1]
        exec(compile(source, page, "exec"), vars(module))


@pytest.mark.django_db
@pytest.mark.parametrize(("page", "name"), CASES)
def test_the_python_of_a_page_runs(page, name, module, request):
    with transaction.atomic():
        run(page, module)
        transaction.set_rollback(True)
    if name:
        test = getattr(module, name)
        if isinstance(test, type):
            run_test_case(test)
        else:
            fixtures = inspect.signature(test).parameters
            test(**{fixture: request.getfixturevalue(fixture) for fixture in fixtures})


def run_test_case(case: type[unittest.TestCase]) -> None:
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    assert result.testsRun > 0
    assert [trace for _, trace in result.failures + result.errors] == []


@pytest.mark.parametrize("page", FILES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert [link for link in LINK.findall(prose) if not (page.parent / link).exists()] == []


def test_pages_with_code_are_found():
    assert ROOT / "README.md" in PAGES
    assert ROOT / "docs" / "tutorial" / "first-job.md" in PAGES


@pytest.mark.parametrize("key", conf.known_keys())
def test_a_setting_is_documented_with_its_default(key):
    page = (ROOT / "docs" / "reference" / "settings.md").read_text()
    [default] = re.findall(rf"^`{key}` \(default `(.*)`\)$", page, re.MULTILINE)
    assert eval(default) == getattr(conf.Defaults, key)
