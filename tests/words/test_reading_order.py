"""
The package reads from top to bottom: a module imports only what comes before it.

Moving a name means moving it here and in docs/explanation too.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import django_jobs

PACKAGE = Path(django_jobs.__file__).parent

ORDER = """
    conf clock exceptions payloads signals backoff triggers matching endings flags policies registry
    models
    wakeup outage scribe runlog events history passes gates seats admission perform overdue wanted waiting branches
    steps desk awaited cancelling executor routing verbs pauses operations retention services
    housekeeping scheduler broker channel pusher worker cluster
    checks health console rehearsal testing pytest_plugin tasks endpoint urls admin management apps
    catalog
""".split()

MODELS = "fields sql claim event run lane step attempt listener log job operation worker".split()

#: The only modules that know django-q2.
ON_DJANGO_Q = {"broker", "scheduler", "cluster"}

#: What the catalogue, an app like any host's, may use besides the names of ``django_jobs`` itself.
PUBLIC = {"conf", "exceptions", "flags", "models", "registry", "services", "signals", "testing"}

MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if "migrations" not in path.parts]


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted names that ``path`` imports, relative ones made absolute."""
    home = path.relative_to(PACKAGE.parent).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) + 1 - node.level] if node.level else ()
            stem = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def imported_modules(path: Path) -> set[str]:
    """The modules of the package that ``path`` imports, by their first name."""
    names = (name.split(".") for name in imports(path))
    return {parts[1] for parts in names if parts[0] == PACKAGE.name and parts[1:] and parts[1] in ORDER}


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def of_the_order(*, without: str = "") -> list[Path]:
    return [path for path in MODULES if place(path) not in {"__init__", without}]


@pytest.mark.parametrize("path", of_the_order(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_comes_before_it(path):
    here = place(path)
    assert here in ORDER, f"{here} has no place in the reading order"

    below = {name for name in imported_modules(path) if ORDER.index(name) > ORDER.index(here)}

    assert not below, f"{here} imports {sorted(below)}, which come after it"


def test_a_model_imports_only_the_models_before_it():
    for path in (PACKAGE / "models").glob("*.py"):
        if path.stem == "__init__":
            continue
        assert path.stem in MODELS, f"models.{path.stem} has no place in the reading order"
        siblings = (
            name.split(".")[2] for name in imports(path) if name.startswith(f"{PACKAGE.name}.models.")
        )
        below = {name for name in siblings if name in MODELS[MODELS.index(path.stem) :]}
        assert not below, f"models.{path.stem} imports {sorted(below)}, which come after it"


def test_only_three_modules_know_django_q():
    for path in MODULES:
        knows = any(name.split(".")[0] == "django_q" for name in imports(path))
        assert not knows or place(path) in ON_DJANGO_Q, f"{place(path)} imports django_q"


def test_the_catalogue_uses_public_names_only():
    for path in MODULES:
        if place(path) == "catalog":
            private = imported_modules(path) - PUBLIC - {"catalog"}
            assert not private, f"{path.relative_to(PACKAGE)} imports {sorted(private)}"


def test_importing_the_package_imports_no_model():
    top = ast.parse((PACKAGE / "__init__.py").read_text()).body
    imported = [node for node in top if isinstance(node, ast.ImportFrom | ast.Import)]
    assert {node.module for node in imported} == {"importlib", "typing"}
