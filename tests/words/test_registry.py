"""Declaring jobs, and which of them count."""

from datetime import timedelta

import pytest
from django.test import override_settings

from django_jobs import Backoff, InvalidJob, JobNotFound, cron, job, on, registry
from django_jobs.exceptions import UnknownGate

pytestmark = pytest.mark.usefixtures("bare_registry")


def a_job(id="a-job", *triggers, **policy):
    """Declare a job whose function has a place of its own, as two functions in two modules do."""

    def handler(ctx):
        """Do something."""

    handler.__qualname__ = f"handler_of_{id}"
    return job(id, *triggers, **policy)(handler)


def test_a_declared_job_is_found_by_its_id_with_all_it_was_given():
    made = a_job(
        "send-invoice",
        on("invoice/due"),
        group="billing",
        retries=2,
        version="3",
        queue="mail",
        priority=5,
        retention=timedelta(days=90),
    )

    assert registry.get("send-invoice") is made
    assert (made.group, made.retries, made.version, made.queue, made.priority) == (
        "billing",
        2,
        "3",
        "mail",
        5,
    )
    assert [str(trigger) for trigger in made.triggers] == ['on("invoice/due")']
    assert made.retention == timedelta(days=90)
    assert made.doc == "Do something."
    assert made.backoff == Backoff()


def test_a_job_can_still_be_called_as_the_function_it_was():
    @job("double")
    def double(number):
        return number * 2

    assert double(4) == 8


@pytest.mark.parametrize(
    "id",
    ["", "Send", "send_invoice", "send--invoice", "-send", "send-", "send invoice", "ä", "a" * 101, 7, None],
)
def test_an_id_that_is_not_kebab_case_is_refused(id):
    with pytest.raises(InvalidJob, match="kebab-case"):
        job(id)(lambda ctx: None)


def test_the_same_id_in_two_places_is_refused_naming_both():
    @job("twice")
    def first(ctx):
        pass

    with pytest.raises(InvalidJob) as raised:

        @job("twice")
        def second(ctx):
            pass

    assert first.handler.__qualname__ in str(raised.value)
    assert "second" in str(raised.value)
    assert registry.get("twice") is first


def test_declaring_the_same_function_again_replaces_the_job_as_a_reload_does():
    a_job("again", retries=1)
    newer = a_job("again", retries=2)

    assert registry.get("again") is newer
    assert [made.id for made in registry.jobs()] == ["again"]


def test_an_option_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(InvalidJob, match=r"no option retry.*retries"):
        a_job(retry=3)


@pytest.mark.parametrize(
    ("policy", "word"),
    [
        ({"retries": -1}, "retries"),
        ({"retries": True}, "retries"),
        ({"retries": 1.5}, "retries"),
        ({"gate": 7}, "gate"),
        ({"gate": ""}, "gate"),
        ({"gate": ()}, "gate"),
        ({"group": None}, "group"),
        ({"group": "g" * 101}, "group"),
        ({"version": 2}, "version"),
        ({"version": ""}, "version"),
        ({"queue": ""}, "queue"),
        ({"queue": "q" * 51}, "queue"),
        ({"priority": "high"}, "priority"),
        ({"priority": 2**31}, "priority"),
        ({"backoff": 3}, 'Job "a-job": backoff'),
        ({"backoff": []}, 'Job "a-job": backoff'),
        ({"retention": 30}, "retention"),
        ({"retention": timedelta(0)}, "retention"),
        ({"retention": timedelta(days=-1)}, "retention"),
        ({"retention": timedelta.max}, "retention"),
        ({"backoff": 3}, "backoff|Backoff"),
    ],
)
def test_a_policy_that_cannot_be_is_refused_where_the_job_is_declared(policy, word):
    with pytest.raises(InvalidJob, match=word):
        a_job(**policy)
    assert registry.known() == []


def test_what_is_not_a_trigger_is_refused():
    with pytest.raises(InvalidJob, match="not a trigger"):
        a_job("a-job", "user/signed.up")


def test_the_same_trigger_twice_is_refused():
    with pytest.raises(InvalidJob, match="twice"):
        a_job("a-job", on("user/signed.up"), on("user/signed.up"))


def test_the_decorator_without_its_brackets_is_refused():
    with pytest.raises(InvalidJob, match="takes the id"):

        @job
        def no_brackets(ctx):
            pass


def test_what_is_not_a_function_is_refused():
    with pytest.raises(InvalidJob, match="function"):
        job("a-job")("not a function")


def test_a_job_nobody_declares_is_not_found_and_the_error_lists_those_that_are():
    a_job("one")
    with pytest.raises(JobNotFound, match=r'"won".*one'):
        registry.get("won")
    assert registry.find("won") is None


def test_a_job_behind_a_closed_gate_is_declared_but_not_registered():
    with override_settings(DJANGO_JOBS={"FLAGS": {"payment": {"enabled": False}}}):
        gated = a_job("charge", on("invoice/due"), gate="payment.enabled")

        assert registry.jobs() == []
        assert registry.listening("invoice/due") == []
        assert registry.find("charge") is gated
        assert registry.known() == [gated]
        with pytest.raises(JobNotFound, match=r"gate payment\.enabled is off"):
            registry.get("charge")


def test_declared_lists_every_job_with_the_flag_that_keeps_it_out():
    with override_settings(DJANGO_JOBS={"FLAGS": {"a": True, "b": False}}):
        a_job("always")
        a_job("allowed", gate="a")
        a_job("kept-out", gate=("a", "b"), group="billing")

        rows = registry.declared()

        assert {row.id: row.closed_by for row in rows} == {"always": None, "allowed": None, "kept-out": "b"}
        assert rows[2].group == "billing"
        made, flag = rows[2]
        assert (made.id, flag) == ("kept-out", "b")


def test_a_gate_is_read_live():
    a_job("charge", on("invoice/due"), gate="payment")

    for wanted in (True, False, True):
        with override_settings(DJANGO_JOBS={"FLAGS": {"payment": wanted}}):
            assert [made.id for made in registry.jobs()] == ["charge"] * wanted
            assert [made.id for made in registry.listening("invoice/due")] == ["charge"] * wanted


def test_an_unknown_gate_is_an_error_that_names_the_nearest_flag():
    a_job("charge", gate="payment.enabeld")
    with (
        override_settings(DJANGO_JOBS={"FLAGS": {"payment": {"enabled": True}}}),
        pytest.raises(UnknownGate, match=r"payment\.enabled"),
    ):
        registry.jobs()


def test_a_job_listens_to_its_events_and_wildcards_and_to_nothing_else():
    a_job("exact", on("user/signed.up"))
    a_job("wide", on("user/*"))
    a_job("both", on("user/signed.up"), on("user/signed.*"))
    a_job("timed", cron("0 3 * * *"))

    assert [made.id for made in registry.listening("user/signed.up")] == ["exact", "both", "wide"]
    assert [made.id for made in registry.listening("user/deleted")] == ["wide"]
    assert registry.listening("invoice/due") == []


def test_a_job_declared_later_is_heard_too():
    a_job("first", on("user/deleted"))
    registry.listening("user/deleted")
    a_job("second", on("user/deleted"))

    assert [made.id for made in registry.listening("user/deleted")] == ["first", "second"]


def test_the_crons_of_a_job_are_those_of_its_triggers():
    made = a_job("mixed", on("user/deleted"), cron("0 3 * * *"), cron("0 15 * * *", tz="Europe/Berlin"))

    assert [trigger.key for trigger in made.crons] == ["0 3 * * * UTC", "0 15 * * * Europe/Berlin"]


def test_discovery_imports_the_module_the_settings_name_and_none_when_told_so(monkeypatch):
    looked_for = []
    monkeypatch.setattr(registry, "autodiscover_modules", looked_for.append)

    with override_settings(DJANGO_JOBS={"AUTODISCOVER": "background"}):
        registry.autodiscover()
    with override_settings(DJANGO_JOBS={"AUTODISCOVER": None}):
        registry.autodiscover()

    assert looked_for == ["background"]


# The engine's own.


def test_an_id_of_the_engines_own_is_refused():
    with pytest.raises(InvalidJob, match="ids that begin with django-jobs- are the engine's own"):
        a_job("django-jobs-mine")
    assert registry.known(own=True) == []


def test_the_engines_own_jobs_are_there_but_in_no_listing():
    own = registry.register(registry.Job(id="django-jobs-sweep", handler=lambda ctx: None))
    made = a_job("mine")

    assert registry.known() == registry.jobs() == [made]
    assert registry.known(own=True) == registry.jobs(own=True) == [own, made]
    assert [job for job, _ in registry.declared()] == [made]
    assert registry.find("django-jobs-sweep") is registry.get("django-jobs-sweep") is own
    with pytest.raises(JobNotFound, match=r"Declared: mine\.$"):
        registry.get("yours")
