"""``manage.py jobs`` as one calls it, and a few jobs to call it on."""

import json

import pytest
from django.core.management import call_command
from django_q.models import Schedule

from django_jobs import NonRetriableError, job, on
from django_jobs.models import Job


@pytest.fixture(autouse=True)
def _alone(bare_registry, db):
    """No job but the test's own, and nothing that ``migrate`` wrote down of the others."""
    Job.objects.all().delete()
    Schedule.objects.all().delete()


@pytest.fixture
def manage(capsys):
    """Run ``manage.py jobs ...`` and return what it printed."""

    def run(*arguments):
        capsys.readouterr()
        call_command("jobs", *map(str, arguments))
        return capsys.readouterr().out

    return run


@pytest.fixture
def as_json(manage):
    """The same with ``--json``: one document and nothing else."""
    return lambda *arguments: json.loads(manage(*arguments, "--json"))


@pytest.fixture
def greet():
    @job("greet", on("user/signed.up"), group="people")
    def greet(ctx):
        """Say hello."""
        return ctx.step.run("say", lambda: f"hello {ctx.event.data.get('name', 'you')}")

    return greet


@pytest.fixture
def fail():
    """A job that fails until it is told the world is mended."""
    world = {"broken": True}

    @job("fail", on("world/ended"))
    def fail(ctx):
        ctx.step.run("before", lambda: "done")
        if world["broken"]:
            raise NonRetriableError("the world is broken")
        return "mended"

    fail.handler.world = world
    return fail
