"""The system checks: each finds what it is for, says what to do, and keeps quiet otherwise."""

import re
from pathlib import Path

import pytest
from django.apps import apps
from django.core.checks import run_checks
from django.core.management import get_commands
from django.db import connections, router
from django.test import override_settings

from django_jobs import checks, conf, flags, job, scheduler
from django_jobs.models import Run

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "checks.md"


def found(*ids):
    """Run our checks; return their messages, of these ids or all."""
    messages = run_checks(tags=[checks.TAG])
    return [message for message in messages if not ids or message.id in ids]


def with_jobs(**changes):
    return override_settings(DJANGO_JOBS=changes)


@pytest.fixture(autouse=True)
def _flags_of_the_test_alone(bare_registry, monkeypatch):
    monkeypatch.setattr(flags, "_defaults", {})


def test_the_test_project_has_nothing_to_mend():
    assert found() == []


@pytest.mark.parametrize("nonsense", [[("THREADS", 8)], "THREADS=8", 8, None])
def test_settings_that_are_no_dict_are_an_error(nonsense):
    with override_settings(DJANGO_JOBS=nonsense):
        [error] = found()
    assert error.id == "django_jobs.E001"
    assert type(nonsense).__name__ in error.msg


def test_an_unknown_key_is_an_error_that_names_the_nearest_one():
    with with_jobs(THREDS=8):
        [error] = found("django_jobs.E002")
    assert "THREDS" in error.msg
    assert '"THREADS"' in error.hint


def test_a_key_in_small_letters_is_unknown_and_its_neighbour_is_found():
    with with_jobs(threads=8):
        [error] = found("django_jobs.E002")
    assert '"THREADS"' in error.hint


def test_an_unknown_key_that_is_near_to_none_gets_the_list():
    with with_jobs(**{"ZEBRA!": 8}):
        [error] = found("django_jobs.E002")
    assert all(key in error.hint for key in conf.known_keys())


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("FLAGS", ["a"], "dict"),
        ("CATALOG", None, "dict"),
        ("EVENT_KEYS", "secret", "list or tuple"),
        ("AUTODISCOVER", 5, "str or None"),
        ("WORKERS", "4", "int or None"),
        ("WORKERS", 0, "above zero"),
        ("THREADS", True, "int"),
        ("THREADS", 2.5, "int"),
        ("THREADS", None, "int"),
        ("THREADS", -1, "above zero"),
        ("GRACE_SECONDS", -1, "zero or above"),
        ("LEASE_SECONDS", 0, "above zero"),
        ("LEASE_SECONDS", float("nan"), "above zero"),
        ("POLL_SECONDS", float("inf"), "above zero"),
        ("MAX_CRASHES", 0, "above zero"),
        ("MAX_HTTP_BYTES", 0, "above zero"),
        ("MAX_HTTP_EVENTS", "5000", "int"),
        ("RETENTION_DAYS", "30", "int or float or None"),
        ("MAX_LOGS", -1, "zero or above"),
        ("LOG_LEVEL", 20, "str"),
        ("LOG_LEVEL", "info", "one of .*INFO"),
        ("LOG_LEVEL", "LOUD", "one of .*WARNING"),
        ("HOUSEKEEPING", 1, "True or False"),
    ],
)
def test_a_value_that_cannot_be_is_an_error_that_says_what_it_must_be(key, value, wanted):
    with with_jobs(**{key: value}):
        [error] = found("django_jobs.E003")
    assert f'DJANGO_JOBS["{key}"]' in error.msg.replace("  ", " ")
    assert re.search(wanted, re.sub(r"\s+", " ", error.msg))
    assert repr(getattr(conf.Defaults, key)) in error.hint


def test_every_default_would_pass_as_a_setting():
    with with_jobs(**{key: getattr(conf.Defaults, key) for key in conf.known_keys()}):
        assert found() == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("WORKERS", None),
        ("GRACE_SECONDS", 0),
        ("MAX_LOGS", 0),
        ("LOG_LEVEL", "ERROR"),
        ("POLL_SECONDS", 0.5),
        ("RETENTION_DAYS", None),
        ("HOUSEKEEPING", False),
        ("AUTODISCOVER", None),
        ("EVENT_KEYS", ["a-key_of.twenty~chars"]),
        ("EVENT_KEYS", ("0123456789abcdefghij", "ABCDEFGHIJ0123456789")),
    ],
)
def test_the_less_usual_values_are_fine(key, value):
    with with_jobs(**{key: value}):
        assert found() == []


@pytest.mark.parametrize(
    "key",
    [
        None,
        "",
        12345678901234567890,
        b"0123456789abcdefghij",
        "0123456789/abcdefghij",
        "0123456789 abcdefghij",
        "ключ" * 5,
    ],
    ids=repr,
)
def test_an_event_key_that_cannot_stand_in_a_path_is_an_error_that_names_its_place(key):
    with with_jobs(EVENT_KEYS=["0123456789abcdefghij", key]):
        [error] = found()

    assert error.id == "django_jobs.E008"
    assert 'DJANGO_JOBS["EVENT_KEYS"][1]' in error.msg


def test_an_event_key_that_could_be_guessed_is_warned_of():
    with with_jobs(EVENT_KEYS=["hunter2"]):
        [warning] = found()

    assert warning.id == "django_jobs.W003"
    assert "7 characters" in warning.msg
    assert "token_urlsafe" in warning.hint


@pytest.mark.parametrize("keys", [["hunter2"], ["hunter/2"], "hunter2"], ids=str)
def test_no_check_prints_an_event_key(keys):
    with with_jobs(EVENT_KEYS=keys):
        [message] = found()

    assert "hunter" not in message.msg + message.hint


def test_a_gate_that_names_no_flag_is_an_error_with_job_path_and_nearest_flag():
    job("charge", gate=("payment.enabled", "credits.enabeld"))(lambda ctx: None)

    with with_jobs(FLAGS={"payment": {"enabled": True}, "credits": {"enabled": False}}):
        [error] = found()

    assert error.id == "django_jobs.E004"
    assert '"charge"' in error.msg
    assert '"credits.enabeld"' in error.msg
    assert '"credits.enabled"' in error.msg


def test_a_gate_on_a_flag_that_is_off_is_no_mistake():
    job("charge", gate="payment.enabled")(lambda ctx: None)
    with with_jobs(FLAGS={"payment": {"enabled": False}}):
        assert found() == []


def test_a_gate_that_is_a_function_is_not_called_by_the_checks():
    def gate():
        raise AssertionError("It may need the database, which is not to be touched here.")

    job("charge", gate=gate)(lambda ctx: None)
    assert found() == []


def test_a_project_without_time_zones_is_an_error():
    with override_settings(USE_TZ=False):
        [error] = found()
    assert error.id == "django_jobs.E005"


def test_a_project_without_django_q_is_an_error(monkeypatch):
    installed = apps.is_installed
    monkeypatch.setattr(apps, "is_installed", lambda name: name != "django_q" and installed(name))
    [error] = found()
    assert error.id == "django_jobs.E006"
    assert "INSTALLED_APPS" in error.hint


def test_a_host_s_cluster_with_the_name_of_ours_is_an_error():
    with override_settings(Q_CLUSTER={"name": scheduler.CLUSTER}):
        [error] = found()
    assert error.id == "django_jobs.E007"


def test_a_host_without_a_cluster_of_its_own_is_fine(settings):
    del settings.Q_CLUSTER
    assert found() == []


@pytest.fixture
def _owners():
    """Let the commands be looked up again, and once more after the test."""
    get_commands.cache_clear()
    yield
    get_commands.cache_clear()


@pytest.mark.usefixtures("_owners")
def test_another_app_s_runjobs_that_comes_first_is_named(monkeypatch, tmp_path):
    commands = tmp_path / "management" / "commands"
    commands.mkdir(parents=True)
    (commands / "runjobs.py").touch()
    first = apps.get_app_config("admin")
    monkeypatch.setattr(first, "path", str(tmp_path))

    [warning] = found()

    assert warning.id == "django_jobs.W001"
    assert "django.contrib.admin" in warning.msg
    assert warning.hint == 'Put "django_jobs" before "django.contrib.admin" in INSTALLED_APPS.'


@pytest.mark.usefixtures("_owners")
def test_another_app_s_runjobs_that_comes_later_is_none_of_our_business(monkeypatch, tmp_path):
    commands = tmp_path / "management" / "commands"
    commands.mkdir(parents=True)
    (commands / "runjobs.py").touch()
    last = [*apps.get_app_configs()][-1]
    monkeypatch.setattr(last, "path", str(tmp_path))

    assert found() == []


GOOD = {
    "transaction_mode": "IMMEDIATE",
    "timeout": 20,
    "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
}


@pytest.mark.parametrize(
    ("options", "faults"),
    [
        (GOOD, []),
        (GOOD | {"transaction_mode": "exclusive"}, []),
        (GOOD | {"init_command": "pragma journal_mode = wal"}, []),
        (GOOD | {"transaction_mode": "DEFERRED"}, ["transaction_mode"]),
        (GOOD | {"init_command": "PRAGMA synchronous=NORMAL"}, ["init_command"]),
        (GOOD | {"timeout": 5}, ["timeout"]),
        ({}, ["transaction_mode", "init_command", "timeout"]),
    ],
)
def test_a_sqlite_database_is_asked_for_what_several_processes_need(options, faults):
    said = checks.sqlite_faults(options)
    assert len(said) == len(faults)
    assert all(fault in words for fault, words in zip(faults, said, strict=True))


@pytest.mark.only_on("sqlite")
def test_a_sqlite_database_as_startproject_leaves_it_is_warned_of_once_with_the_cure(monkeypatch):
    connection = connections[router.db_for_write(Run)]
    monkeypatch.setitem(connection.settings_dict, "OPTIONS", {})

    [warning] = found()

    assert warning.id == "django_jobs.W002"
    assert "IMMEDIATE" in warning.hint
    assert "journal_mode=WAL" in warning.hint


@pytest.mark.only_on("postgresql", "mysql")
def test_other_databases_are_not_asked_for_what_sqlite_needs(monkeypatch):
    monkeypatch.setitem(connections[router.db_for_write(Run)].settings_dict, "OPTIONS", {})
    assert found() == []


def ids_in_the_source():
    return sorted(set(re.findall(r'"django_jobs\.([EW]\d{3})"', Path(checks.__file__).read_text())))


def test_there_are_ids_to_document():
    assert ids_in_the_source() == [*(f"E00{n}" for n in range(1, 9)), "W001", "W002", "W003"]


@pytest.mark.parametrize("id", ids_in_the_source())
def test_every_check_has_a_section_in_the_reference(id):
    assert re.search(rf"^#+ .*django_jobs\.{id}", PAGE.read_text(), re.MULTILINE)
