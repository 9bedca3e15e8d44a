"""A claim reads the few rows it takes, however many sleep or are finished."""

import json

import pytest
from django.db import connection

from django_jobs import clock
from django_jobs.models import Run, claim
from django_jobs.models.sql import adapt

MANY = 20_000
LIMIT = 5

#: Sleeping and finished runs, made where they are stored: ``{n}`` counts from 1 to MANY.
SERIES = {
    "postgresql": ("gen_random_uuid()", "n", f"generate_series(1, {MANY}) n"),
    "sqlite": (
        "lower(hex(randomblob(16)))",
        "n",
        f"(WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < {MANY}) SELECT n FROM s)",
    ),
    "mysql": ("replace(uuid(), '-', '')", "seq", f"seq_1_to_{MANY}"),
}


@pytest.fixture
def crowd(a_run):
    """20,000 sleeping and 20,000 finished runs, and ten due ones of another priority among them."""
    sleeping = a_run("sleeping", wake_at=clock.now().replace(year=2030))
    finished = a_run("completed", finished_at=clock.now())
    for template in (sleeping, finished):
        multiply(template)
    for number in range(2 * LIMIT):
        a_run(priority=number % 2)
    with connection.cursor() as cursor:
        cursor.execute(
            "ANALYZE TABLE django_jobs_run" if connection.vendor == "mysql" else "ANALYZE django_jobs_run"
        )


def multiply(template):
    new_id, n, series = SERIES[connection.vendor]
    columns = [field.column for field in Run._meta.concrete_fields if field.column != "id"]
    chosen = ", ".join("(%s) % 3" if column == "priority" else column for column in columns)
    chosen = chosen.replace("(%s) % 3", f"{n} % 3")
    statement = (
        f"INSERT INTO django_jobs_run (id, {', '.join(columns)})"
        f" SELECT {new_id}, {chosen} FROM {series} CROSS JOIN django_jobs_run WHERE django_jobs_run.id = "
    )
    with connection.cursor() as cursor:
        cursor.execute(statement.replace("%", "%%") + "%s", [adapt(connection, template.pk)])


def statements_of(work):
    """Do ``work`` and return its statements with their parameters."""
    seen = []

    def note(execute, sql, params, many, context):
        seen.append((sql, params))
        return execute(sql, params, many, context)

    with connection.execute_wrapper(note):
        work()
    return [(sql, params) for sql, params in seen if sql.lstrip().startswith(("SELECT", "WITH", "UPDATE"))]


def ask(prefix, sql, params):
    with connection.cursor() as cursor:
        cursor.execute(f"{prefix} {sql}", params)
        return cursor.fetchall()


def take():
    assert len(Run.objects.claim(LIMIT, jobs=["a-job"], queues=["default"])) == LIMIT


def nodes(plan):
    yield plan
    for part in plan.get("Plans", ()):
        yield from nodes(part)


@pytest.mark.only_on("postgresql")
def test_on_postgresql_a_claim_walks_its_index_and_reads_only_what_it_takes(crowd):
    [(sql, params)] = statements_of(take)

    [[[explained]]] = ask("EXPLAIN (ANALYZE, FORMAT JSON)", sql, params)
    steps = list(nodes(explained["Plan"]))

    assert "django_jobs_run_claim" in {step.get("Index Name") for step in steps}
    assert not [step for step in steps if step["Node Type"] == "Seq Scan"]
    for step in steps:
        read = (step["Actual Rows"] + step.get("Rows Removed by Filter", 0)) * step["Actual Loops"]
        assert read <= 10 * LIMIT, step


@pytest.mark.only_on("sqlite")
def test_on_sqlite_a_claim_walks_its_index(crowd):
    [(sql, params)] = statements_of(take)

    plan = [row[-1] for row in ask("EXPLAIN QUERY PLAN", sql, params)]

    [search] = [line for line in plan if line.startswith("SEARCH ready")]
    assert "django_jobs_run_claim (queue=? AND priority=? AND wake_at<?)" in search
    scanned = {line.split()[1] for line in plan if line.startswith("SCAN") and "INDEX" not in line}
    assert not scanned & {"django_jobs_run", "below", "next", "ready", "found"}


@pytest.mark.only_on("mysql")
@pytest.mark.django_db(transaction=True)  # MariaDB's ANALYZE TABLE commits.
def test_on_mariadb_a_claim_walks_its_index_and_reads_only_what_it_takes(crowd):
    claim.forget()
    statements = statements_of(take)
    claim.forget()

    pairs, *locked, update = [
        json.loads(ask("ANALYZE FORMAT=JSON", sql, params)[0][0]) for sql, params in statements
    ]

    assert table(pairs)["using_index_for_group_by"]
    assert table(pairs)["r_rows"] <= 10
    for plan in locked:
        assert table(plan)["key"] == "django_jobs_run_claim"
        assert table(plan)["r_rows"] <= 2 * LIMIT
        assert "filesort" not in json.dumps(plan)
    assert table(update)["key"] == "PRIMARY"
    assert table(update)["r_rows"] <= 2 * LIMIT


def table(plan):
    """Return what MariaDB says of the one table a statement reads."""
    found = json.dumps(plan)
    block = plan["query_block"]
    while "table" not in block:
        inner = [value for value in block.values() if isinstance(value, dict)]
        inner += [value[0] for value in block.values() if isinstance(value, list)]
        assert len(inner) == 1, found
        [block] = inner
    return block["table"]
