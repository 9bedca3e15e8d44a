"""Many runs like one that there is, with what they listen for; made where they are stored."""

from django.db import connection

from django_jobs.models import Listener, Run, Step
from django_jobs.models.sql import adapt

#: For each database: a new id, a text that nobody has, and a series of rows.
SQL = {
    "postgresql": ("gen_random_uuid()", "md5(random()::text)", "generate_series(1, {count}) n"),
    "sqlite": (
        "lower(hex(randomblob(16)))",
        "lower(hex(randomblob(16)))",
        "(WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < {count}) SELECT n FROM s)",
    ),
    "mysql": ("replace(uuid(), '-', '')", "md5(rand())", "seq_1_to_{count}"),
}


def multiply(template, count, *, alike):
    """
    Add ``count`` runs like ``template``, with its steps and listeners.

    They listen for the same as it does, or if they are not ``alike`` each for something of its own.
    """
    new_id, own, series = SQL[connection.vendor]
    mark = f"'like {template.pk}'"
    copies = f"JOIN django_jobs_run ON django_jobs_run.claimed_by = {mark}"
    runs = f"{series.format(count=count)} CROSS JOIN django_jobs_run WHERE django_jobs_run.id = %s"
    copy(Run, runs, template, id=new_id, claimed_by=mark)
    steps = f"django_jobs_step {copies} WHERE django_jobs_step.run_id = %s"
    copy(Step, steps, template, run_id="django_jobs_run.id")
    listeners = f"django_jobs_listener {copies}"
    changes = {"run_id": "django_jobs_run.id"} | ({} if alike else {"digest": own})
    if template.listeners.filter(step__isnull=False).exists():
        listeners += " JOIN django_jobs_step ON django_jobs_step.run_id = django_jobs_run.id"
        changes["step_id"] = "django_jobs_step.id"
    copy(Listener, f"{listeners} WHERE django_jobs_listener.run_id = %s", template, **changes)
    with connection.cursor() as cursor:
        for table in ("django_jobs_run", "django_jobs_step", "django_jobs_listener"):
            cursor.execute(f"ANALYZE {'TABLE ' if connection.vendor == 'mysql' else ''}{table}")


def copy(model, source, template, **changes):
    table = model._meta.db_table
    columns = [field.column for field in model._meta.concrete_fields]
    columns = [column for column in columns if column != "id" or "id" in changes]
    chosen = ", ".join(changes.get(column, f"{table}.{column}") for column in columns)
    statement = f"INSERT INTO {table} ({', '.join(columns)}) SELECT {chosen} FROM {source}"
    with connection.cursor() as cursor:
        cursor.execute(statement, [adapt(connection, template.pk)])
