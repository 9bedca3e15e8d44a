import pytest
from django.core.management import call_command
from django.db import connection

OURS = "django_jobs_"


def our_tables():
    return {name for name in connection.introspection.table_names() if name.startswith(OURS)}


def our_constraints():
    with connection.cursor() as cursor:
        return set(connection.introspection.get_constraints(cursor, "django_jobs_run"))


@pytest.mark.django_db
def test_the_migrations_say_what_the_models_say(capsys):
    call_command("makemigrations", "django_jobs", check=True, dry_run=True)

    assert "No changes" in capsys.readouterr().out


@pytest.mark.django_db
def test_the_tables_have_names_of_their_own():
    names = "event run step attempt log job worker".split()

    assert our_tables() >= {OURS + name for name in names}


@pytest.mark.django_db
def test_the_claim_has_its_index_and_the_slot_is_unique():
    assert {"django_jobs_run_claim", "django_jobs_run_slot", "django_jobs_run_job"} <= our_constraints()


@pytest.mark.django_db(transaction=True)
def test_the_migrations_go_to_nothing_and_back():
    before, constraints = our_tables(), our_constraints()
    try:
        call_command("migrate", "django_jobs", "zero", verbosity=0)
        assert not our_tables() & {
            OURS + name for name in ("event", "run", "step", "attempt", "log", "job", "worker")
        }
    finally:
        call_command("migrate", verbosity=0)

    assert our_tables() == before
    assert our_constraints() == constraints
