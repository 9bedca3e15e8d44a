"""Which statements a piece of work makes, with BEGIN and COMMIT counted."""

from django.db import connection
from django.test.utils import CaptureQueriesContext

from django_jobs.executor import execute
from django_jobs.models import Run

BEGIN, COMMIT = "BEGIN", "COMMIT"


def statements(work):
    """Return the first word of each statement that ``work`` makes, NOTIFY left out."""
    with CaptureQueriesContext(connection) as captured:
        work()
    words = [query["sql"].split(maxsplit=1)[0].strip(";") for query in captured]
    return [word for word in words if word != "NOTIFY"]


def claimed(job, data=None):
    job.start(data)
    [run] = Run.objects.claim(1, jobs=[job.id])
    return run


def statements_of_a_pass(job, data=None):
    run = claimed(job, data)
    return statements(lambda: execute(run))


def reading_the_event():
    """A small event comes along with the claim, except on MariaDB, whose claim is no RETURNING."""
    return ["SELECT"] if connection.vendor == "mysql" else []
