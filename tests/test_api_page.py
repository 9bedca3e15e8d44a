"""docs/reference/api.md has every public name, and each signature as the code has it."""

import inspect
import re
from pathlib import Path

import pytest
from django.db.models import Model
from django.dispatch import Signal

import django_jobs
from django_jobs import exceptions, models, registry, services, signals, testing
from django_jobs.executor import Context
from django_jobs.steps import Steps

PAGE = (Path(__file__).parent.parent / "docs" / "reference" / "api.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", PAGE, re.MULTILINE))


def public(module):
    """The names that ``module`` itself defines, without the wording of the log."""
    for name, value in vars(module).items():
        is_its_own = isinstance(value, Signal) or getattr(value, "__module__", "") == module.__name__
        if is_its_own and not name.startswith(("_", "log_")):
            yield name


def attributes(kind):
    return [name for name in vars(kind) if not name.startswith("_")]


def given(kind):
    """The attributes that ``kind`` gives itself when it is made."""
    return re.findall(r"self\.([a-z]\w*)(?:: .+)? = ", inspect.getsource(kind.__init__))


def fields(model):
    """What a row shows to code outside, its id apart; columns that nobody may edit are the engine's own."""
    for field in model._meta.get_fields():
        if not field.concrete:
            yield field.get_accessor_name()
        elif field.editable and not field.primary_key:
            yield field.name


JOB_FIELDS = registry.Job.__dataclass_fields__
OPTIONS = sorted(JOB_FIELDS.keys() - {"id", "handler", "triggers"})
MODELS = [model for model in vars(models).values() if isinstance(model, type(Model))]

NAMES = {
    "django_jobs": django_jobs.__all__,
    "ctx": [*given(Context), *attributes(Context)],
    "ctx.step": attributes(Steps),
    "django_jobs.registry": [*public(registry), *attributes(registry.Job), *JOB_FIELDS],
    "django_jobs.models": models.__all__,
    "django_jobs.services": [*public(services)],
    "django_jobs.signals": [*public(signals)],
    "django_jobs.exceptions": [*public(exceptions)],
    "django_jobs.testing": [*public(testing), *attributes(testing.Jobs)],
}
CASES = [(section, name) for section, names in NAMES.items() for name in sorted({*names})]

HOMES = {
    "django_jobs": django_jobs,
    "ctx": Context,
    "ctx.step": Steps,
    "django_jobs.registry": registry,
    "django_jobs.services": services,
    "django_jobs.exceptions": exceptions,
    "django_jobs.testing": testing,
}
SIGNATURES = [
    (section, name, parameters)
    for section, text in SECTIONS.items()
    for name, parameters in re.findall(r"^### `(\w+)(\(.*\))`$", text, re.MULTILINE)
]


@pytest.mark.parametrize(("section", "name"), CASES)
def test_a_public_name_is_in_its_section(section, name):
    assert re.search(rf"`(ctx\.)?{name}\b|^### {name}$", SECTIONS[section], re.MULTILINE)


@pytest.mark.parametrize("model", MODELS)
def test_the_fields_of_a_model_are_in_its_section(model):
    [part] = re.findall(rf"^### {model.__name__}\n((?:(?!##).*\n)*)", PAGE, re.MULTILINE)
    missing = [name for name in fields(model) if f"`{name}`" not in part]
    assert missing == []


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_of_a_job_is_documented_with_its_default(option):
    default = "Backoff()" if option == "backoff" else repr(JOB_FIELDS[option].default).replace("'", '"')
    assert f"| `{option}` | `{default}` |" in SECTIONS["django_jobs"]


@pytest.mark.parametrize(("section", "name", "parameters"), SIGNATURES)
def test_a_signature_is_as_the_code_has_it(section, name, parameters):
    given = inspect.signature(getattr(HOMES[section], name)).parameters.values()
    plain = [each.replace(annotation=each.empty) for each in given if each.name != "self"]
    text = str(inspect.Signature(plain))
    assert parameters == text.replace("'", '"').replace("datetime.", "")


def test_signatures_are_found():
    assert len(SIGNATURES) > 20
