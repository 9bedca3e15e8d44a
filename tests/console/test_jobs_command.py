"""``manage.py jobs``: what it prints for people and for machines, and how it ends."""

import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError
from django.test import override_settings

from django_jobs import console, cron, emit, job, on, operations, registry, services, signals
from django_jobs.management import acting
from django_jobs.management.commands import jobs as jobs_command
from django_jobs.management.commands import runjobs
from django_jobs.models import Event, Job, Operation, Run, RunStatus, Step

ROOT = Path(__file__).parents[2]
ISO = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00")


def refusal(*arguments):
    """Call a command that must fail; return its line and its exit code."""
    with pytest.raises(CommandError) as raised:
        call_command("jobs", *map(str, arguments))
    line = str(raised.value)
    assert line
    assert "\n" not in line
    return line, raised.value.returncode


# list


def test_list_shows_each_job_with_its_triggers_and_what_keeps_it_out(manage, greet):
    @job("charge", cron("0 3 * * *", tz="Europe/Berlin"), gate="payment.enabled")
    def charge(ctx):
        pass

    with override_settings(DJANGO_JOBS={"FLAGS": {"payment": {"enabled": False}}}):
        lines = manage("list").splitlines()

    assert re.match(
        r"charge +cron\(\"0 3 \* \* \*\", tz=\"Europe/Berlin\"\) +off: payment\.enabled +never", lines[1]
    )
    assert re.match(r"greet +on\(\"user/signed\.up\"\) +on +never", lines[2])


def test_list_shows_the_next_and_the_last_run(manage, jobs, greet):
    jobs.travel_to(datetime(2030, 1, 1, 1, tzinfo=UTC))

    @job("report", cron("0 3 * * *"))
    def report(ctx):
        pass

    services.sync()
    jobs.run(greet)

    text = manage("list")

    assert re.search(r"report .* in 2 h +never", text)
    assert re.search(r"greet .* completed now", text)


def test_list_without_a_job_says_how_to_get_one(manage):
    assert "@job" in manage("list")


def test_list_for_machines_has_the_fields_of_the_model(as_json, jobs, greet):
    services.sync()
    run = jobs.run(greet)

    [row] = as_json("list")

    assert {field.name for field in Job._meta.fields} <= row.keys()
    assert (row["id"], row["group"], row["doc"]) == ("greet", "people", "Say hello.")
    assert row["triggers"] == ['on("user/signed.up")']
    assert row["last_run"]["id"] == str(run.pk)
    assert row["last_run"]["status"] == "completed"


def test_list_shows_jobs_that_only_the_database_remembers(manage, as_json, greet):
    Job.objects.create(id="forgotten", synced_at=datetime.now(UTC))

    assert re.search(r"forgotten .*not declared", manage("list"))
    assert {row["id"]: row["declared"] for row in as_json("list")} == {"forgotten": False, "greet": True}


# runs


def test_runs_are_shown_newest_first(manage, jobs, greet):
    runs = [jobs.run(greet) for _ in range(3)]
    jobs.advance(timedelta(seconds=1))

    lines = manage("runs").splitlines()[1:]

    assert [line.split()[0] for line in lines] == [str(run.pk) for run in reversed(runs)]
    assert all("completed" in line for line in lines)


def test_runs_are_narrowed_by_job_status_and_number(as_json, jobs, greet, fail):
    done = [jobs.run(greet) for _ in range(3)]
    failed = jobs.run(fail)

    assert [row["id"] for row in as_json("runs", "--status", "failed")] == [str(failed.pk)]
    assert {row["id"] for row in as_json("runs", "--job", "greet")} == {str(run.pk) for run in done}
    assert len(as_json("runs", "--limit", 2)) == 2
    assert as_json("runs", "--job", "greet", "--status", "failed") == []


def test_twenty_runs_are_shown_unless_more_are_asked_for(as_json, greet):
    for _ in range(25):
        greet.start()
    assert len(as_json("runs")) == 20
    assert len(as_json("runs", "--limit", 25)) == 25


def test_runs_without_any_say_what_to_do_next(manage, greet):
    assert "jobs emit" in manage("runs")
    assert "Leave out" in manage("runs", "--status", "failed")
    assert 'no job "gret" is declared. Declared: greet' in manage("runs", "--job", "gret")


def test_a_sleeping_run_says_when_it_wakes_and_a_skipped_one_why(manage, jobs):
    @job("nap", on("night/fallen"))
    def nap(ctx):
        ctx.step.sleep("nap", timedelta(days=14))

    jobs.run(nap)
    other = nap.start()
    services.cancel(other, "No longer wanted.")

    text = manage("runs")

    assert "wakes in 14 d" in text
    assert "No longer wanted." in text


def test_runs_for_machines_have_the_fields_of_the_model(as_json, jobs, greet):
    run = jobs.run(greet)

    [row] = as_json("runs")

    fields = "id job_id version status event error attempt passes priority wake_at queued_at started_at"
    fields += " finished_at scheduled_for reason parent replay_of"
    assert set(fields.split()) <= row.keys()
    assert row["output"] == "hello you"
    assert "lease" not in row
    assert row["event"] == str(run.event_id)
    assert ISO.fullmatch(row["queued_at"])


@pytest.mark.parametrize("limit", ["0", "-1", "many"])
def test_a_limit_that_is_no_number_of_runs_is_a_usage_error(limit):
    with pytest.raises(CommandError, match="above zero"):
        call_command("jobs", "runs", f"--limit={limit}")


# show


def test_show_has_the_run_its_steps_and_its_output(manage, jobs, greet):
    emit("user/signed.up", {"name": "Ada"})
    jobs.drain()
    run = Run.objects.get()

    text = manage("show", run.pk)

    assert text.startswith("greet  completed")
    assert str(run.pk) in text
    assert "user/signed.up" in text
    assert '"hello Ada"' in text
    assert re.search(r"^say +run +completed", text, re.MULTILINE)


def test_show_has_what_failed_with_the_traceback(manage, jobs, fail):
    text = manage("show", jobs.run(fail).pk)

    assert "NonRetriableError: the world is broken" in text
    assert re.search(r"^\(between steps\) +1 ", text, re.MULTILINE)
    assert "Traceback (most recent call last)" in text


def test_show_tells_the_steps_that_are_none_of_the_jobs_code_or_no_longer(manage, as_json, jobs):
    def on_failure(ctx, error):
        ctx.step.run("apologise", str)

    @job("breaks", retries=0, on_failure=on_failure)
    def breaks(ctx):
        ctx.step.run("work", int, "x")

    @job("changes")
    def changes(ctx):
        if not Step.objects.exists():
            ctx.step.run("removed", str)
        ctx.step.sleep("nap", timedelta(days=1))

    changed = jobs.run(changes)
    jobs.advance(timedelta(days=1))
    text = manage("show", changed.pk)
    assert re.search(r"^removed +run +completed .* unvisited$", text, re.MULTILINE)
    assert re.search(r"^nap +sleep +completed (?!.*unvisited)", text, re.MULTILINE)
    assert [step["unvisited"] for step in as_json("show", changed.pk)["steps"]] == [True, False]

    broken = jobs.run(breaks)
    services.retry(broken)
    text = manage("show", broken.pk)
    assert re.search(r"^apologise +run +completed .* on_failure$", text, re.MULTILINE)
    assert re.search(r"^work +run +waiting (?!.*on_failure)", text, re.MULTILINE)
    assert "  Retried   " in text


def test_show_for_machines_is_the_run_with_event_steps_and_attempts(as_json, jobs, fail):
    run = jobs.run(fail, {"when": datetime(2030, 1, 2, tzinfo=UTC), "ids": {1}, "raw": b"\x00"})

    shown = as_json("show", run.pk)

    assert (shown["id"], shown["status"], shown["error"]["type"]) == (
        str(run.pk),
        "failed",
        "NonRetriableError",
    )
    assert shown["event"]["data"] == {"when": "2030-01-02T00:00:00+00:00", "ids": [1], "raw": "AA=="}
    [step] = shown["steps"]
    assert (step["name"], step["kind"], step["status"], step["output"]) == (
        "before",
        "run",
        "completed",
        "done",
    )
    assert {field.name for field in Step._meta.fields if field.editable} <= step.keys()
    [attempt] = shown["attempts"]
    assert (attempt["step"], attempt["number"], attempt["error"]["message"]) == (
        None,
        1,
        "the world is broken",
    )


@pytest.fixture
def talk():
    """A job that says so many things."""

    @job("talk")
    def talk(ctx):
        def work():
            ctx.logger.warning("slow\x1b[31m\nand more")

        ctx.step.run("call", work)
        for number in range(ctx.event.data["lines"]):
            ctx.logger.info("line %s", number)

    return talk


def test_show_has_what_the_run_said_with_time_level_and_step(manage, jobs, talk):
    jobs.travel_to(datetime(2041, 5, 4, 12, 30, 15, tzinfo=UTC))

    text = manage("show", jobs.run(talk, {"lines": 1}).pk)

    log = text.partition("\nLog\n")[2].splitlines()
    assert log[0].split() == ["TIME", "LEVEL", "STEP", "MESSAGE"]
    assert [line.split() for line in log[1:]] == [
        ["2041-05-04", "12:30:15", "warning", "call", "slow", "[31m"],
        ["2041-05-04", "12:30:15", "info", "line", "0"],
    ]


def test_show_has_the_last_lines_of_a_long_log(manage, jobs, talk):
    text = manage("show", jobs.run(talk, {"lines": console.MOST_LINES + 5}).pk)

    assert f"the last {console.MOST_LINES} of {console.MOST_LINES + 6} lines" in text
    assert "line 4" not in text
    assert [f"line {number}" in text for number in (5, console.MOST_LINES + 4)] == [True, True]


def test_show_for_machines_has_all_of_the_log_in_order(as_json, jobs, talk):
    shown = as_json("show", jobs.run(talk, {"lines": console.MOST_LINES + 5}).pk)

    first, *others = shown["logs"]
    assert (first["step"], first["level"], first["logger"], first["number"]) == (
        "call",
        30,
        "django_jobs.job.talk",
        1,
    )
    assert first["message"] == "slow\x1b[31m\nand more"
    assert ISO.fullmatch(first["at"])
    assert [line["message"] for line in others] == [f"line {n}" for n in range(console.MOST_LINES + 5)]


def test_a_run_nobody_knows_is_one_clear_line():
    key = uuid4()
    assert refusal("show", key) == (f"There is no run {key}.", 1)
    assert refusal("show", "nonsense") == ("There is no run nonsense.", 1)
    assert refusal("cancel", key) == (f"There is no run {key}.", 1)
    assert refusal("retry", key) == (f"There is no run {key}.", 1)


# emit and trigger


def test_emit_records_an_event_and_says_what_it_starts(manage, greet):
    text = manage("emit", "user/signed.up", "--data", '{"name": "Ada"}', "--key", "signup:7")

    event = Event.objects.get()
    assert (event.name, event.data, event.key) == ("user/signed.up", {"name": "Ada"}, "signup:7")
    assert str(event.runs.get().pk) in text


def test_emit_without_a_listener_says_so(manage, greet):
    assert "No registered job is triggered by it.\n" in manage("emit", "nobody/listens")
    assert 'triggered by it. Did you mean "user/signed.up"?' in manage("emit", "user/signedup")


def test_emit_says_why_those_who_listen_do_not_start(manage):
    job("charge", on("invoice/due"), gate="payment.enabled")(lambda ctx: None)
    job("remind", on("invoice/*", when=lambda event: False))(lambda ctx: None)

    with override_settings(DJANGO_JOBS={"FLAGS": {"payment": {"enabled": False}}}):
        said = manage("emit", "invoice/due")

    assert "It starts nothing: charge (off: payment.enabled), remind (its when says no)." in said


def test_emit_with_a_key_seen_before_says_that_nothing_started(manage, greet):
    manage("emit", "user/signed.up", "--key", "signup:7")
    assert "nothing was started" in manage("emit", "user/signed.up", "--key", "signup:7")
    assert Run.objects.count() == 1


def test_emit_at_a_time_holds_the_runs_until_then(as_json, greet):
    document = as_json("emit", "user/signed.up", "--at", "2041-05-04T12:00:00+02:00")

    assert document["occurred_at"] == "2041-05-04T10:00:00+00:00"
    assert Run.objects.get().wake_at == datetime(2041, 5, 4, 10, tzinfo=UTC)


@override_settings(TIME_ZONE="Europe/Berlin")
def test_a_time_without_an_offset_is_in_the_zone_of_the_project(as_json):
    assert as_json("emit", "a/b", "--at", "2041-07-01 12:00")["occurred_at"] == "2041-07-01T10:00:00+00:00"


def test_emit_for_machines_is_the_event_with_its_runs(as_json, greet):
    document = as_json("emit", "user/signed.up", "--data", "{}")

    assert {"id", "name", "data", "key", "occurred_at", "received_at"} <= document.keys()
    [run] = document["runs"]
    assert (run["job_id"], run["status"]) == ("greet", "queued")


@pytest.mark.parametrize("verb", ["emit", "trigger"])
@pytest.mark.parametrize(
    ("data", "word"), [("{nonsense", "not JSON"), ("[1]", "object"), ("7", "object"), ("", "not JSON")]
)
def test_data_that_is_no_json_object_is_one_clear_line(verb, data, word, greet):
    line, code = refusal(verb, "greet", "--data", data)
    assert word in line
    assert code == 2
    assert not Event.objects.exists()


@pytest.mark.parametrize("data", ['{"a": NaN}', r'{"a": {"b": "\u0000"}}', r'{"a": {"b": "\ud800"}}'])
def test_data_that_cannot_be_kept_is_refused_with_its_path(data):
    line, code = refusal("emit", "a/b", "--data", data)
    assert ".a" in line
    assert code == 1


def test_an_event_name_that_cannot_be_is_one_clear_line():
    assert refusal("emit", "")[1] == 1
    assert "255" in refusal("emit", "a" * 256)[0]


def test_a_time_that_is_none_is_one_clear_line():
    line, code = refusal("emit", "a/b", "--at", "tomorrow")
    assert "ISO" in line
    assert code == 2


def test_trigger_starts_a_job_whatever_its_triggers(manage, as_json, jobs, greet):
    run = as_json("trigger", "greet", "--data", '{"name": "Ada"}')
    assert "greet" in manage("trigger", "greet")

    jobs.drain()

    assert Run.objects.get(pk=run["id"]).output == "hello Ada"
    assert Run.objects.filter(output__contains="hello you").exists()


def test_a_job_nobody_knows_is_one_clear_line(greet):
    line, code = refusal("trigger", "gret")
    assert '"gret"' in line
    assert "greet" in line
    assert code == 1


def test_a_job_behind_a_gate_is_not_started():
    @job("charge", gate="payment")
    def charge(ctx):
        pass

    with override_settings(DJANGO_JOBS={"FLAGS": {"payment": False}}):
        line, _ = refusal("trigger", "charge")
    assert "payment is off" in line
    assert not Run.objects.exists()


# cancel and retry


def test_cancel_ends_an_open_run_with_its_reason(manage, greet):
    run = greet.start()

    assert str(run.pk) in manage("cancel", run.pk, "--reason", "a mistake")

    run.refresh_from_db()
    assert (run.status, run.reason) == ("cancelled", "a mistake")


def test_what_cannot_be_cancelled_or_retried_says_why(jobs, greet):
    run = jobs.run(greet)
    assert "is completed; only an open run can be cancelled" in refusal("cancel", run.pk)[0]
    assert "is completed; only a failed run can be retried" in refusal("retry", run.pk)[0]
    run.refresh_from_db()
    assert run.status == "completed"


def test_retry_lets_a_failed_run_go_on(manage, as_json, jobs, fail):
    run = jobs.run(fail)
    fail.handler.world["broken"] = False

    assert as_json("retry", run.pk)["status"] == "queued"
    jobs.drain()

    run.refresh_from_db()
    assert (run.status, run.output) == ("completed", "mended")


@pytest.fixture
def heard():
    """What receivers are told of people, as (actor, verb, ids, reason)."""
    told = []

    def hear(sender, actor, verb, ids, reason, **rest):
        told.append((actor, verb, ids, reason))

    signals.admin_action.connect(hear)
    yield told
    signals.admin_action.disconnect(hear)


def test_several_runs_are_acted_on_in_one_go(manage, as_json, greet):
    runs = [greet.start() for _ in range(4)]

    lines = manage("cancel", *(run.pk for run in runs[:2])).splitlines()
    documents = as_json("cancel", *(run.pk for run in runs[2:]))

    assert [str(run.pk) in line for run, line in zip(runs, lines, strict=False)] == [True, True]
    assert [document["id"] for document in documents] == [str(run.pk) for run in runs[2:]]
    assert set(Run.objects.values_list("status", flat=True)) == {"cancelled"}


def test_one_that_is_refused_keeps_no_other_from_it(capsys, jobs, greet):
    over, waiting = jobs.run(greet), greet.start()

    line, code = refusal("cancel", over.pk, "nonsense", waiting.pk, "--json")

    assert code == 1
    assert f"Run {over.pk} is completed; only an open run can be cancelled. There is no run nonsense." == line
    [document] = json.loads(capsys.readouterr().out)
    assert (document["id"], document["status"]) == (str(waiting.pk), "cancelled")


def test_the_runs_a_run_invoked_are_cancelled_with_it_unless_it_goes_alone(manage, greet):
    for alone in ([], ["--alone"]):
        parent, child = greet.start(), greet.start()
        Run.objects.filter(pk=child.pk).update(parent=parent)
        manage("cancel", parent.pk, *alone)
        child.refresh_from_db()
        assert child.status == ("queued" if alone else "cancelled")


@pytest.mark.django_db(transaction=True)
def test_receivers_are_told_who_did_it_and_why(manage, greet, heard, monkeypatch):
    run = greet.start()
    monkeypatch.setenv("LOGNAME", "ada")
    manage("cancel", run.pk, "--reason", "a mistake")
    manage("replay", run.pk, "--actor", "bob")
    assert heard == [("ada", "cancel", [run.pk], "a mistake"), ("bob", "replay", [run.pk], "")]


def test_a_user_without_a_name_is_a_number(monkeypatch):
    def nameless():
        raise OSError("no such user")

    monkeypatch.setattr(acting.getpass, "getuser", nameless)
    assert acting.user() == f"uid {os.getuid()}"


# replay and skip-wait


@pytest.fixture
def trip(jobs):
    """A run of three steps, over."""

    @job("trip")
    def trip(ctx):
        ctx.step.run("pack", lambda: None)
        ctx.step.sleep("night", timedelta(days=1))
        return ctx.step.run("go", lambda: ctx.event.data.get("to", "home"))

    run = jobs.run(trip)
    jobs.advance(timedelta(days=1))
    return run


def test_replay_starts_a_new_run_from_a_step_with_other_data(manage, as_json, jobs, trip):
    assert str(trip.pk) in manage("replay", trip.pk)

    new = as_json("replay", trip.pk, "--from-step", "go", "--data", '{"to": "sea"}')
    jobs.drain()

    assert (new["replay_of"], new["status"]) == (str(trip.pk), "queued")
    assert Run.objects.get(pk=new["id"]).output == "sea"


def test_a_step_that_is_not_there_is_one_clear_line(trip):
    line, code = refusal("replay", trip.pk, "--from-step", "goo")
    assert line == f'Run {trip.pk} has no step "goo". It has: go, night, pack.'
    assert code == 1


@pytest.mark.parametrize("data", ["{nonsense", "[1]"])
def test_other_data_that_is_no_json_object_is_a_usage_error(data, trip):
    assert refusal("replay", trip.pk, "--data", data)[1] == 2
    assert Run.objects.count() == 1


def test_other_data_that_cannot_be_kept_is_refused(trip):
    line, code = refusal("replay", trip.pk, "--data", '{"a": NaN}')
    assert ".a" in line
    assert code == 1


def test_skip_wait_lets_a_sleeping_run_go_on(manage, as_json, jobs, trip):
    run = jobs.run("trip")

    assert f"Run {run.pk} of trip goes on now." in manage("skip-wait", run.pk)
    jobs.drain()

    run.refresh_from_db()
    assert run.status == "completed"
    assert "only one that sleeps" in refusal("skip-wait", run.pk)[0]


# all runs of a filter


@pytest.fixture
def engine(greet):
    """The engine's own job is there to work operations off."""
    registry.register(operations.job)


@pytest.fixture
def answer(monkeypatch):
    """Somebody sits there and answers."""

    def with_words(words):
        asked = []
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or words)
        return asked

    return with_words


def test_all_runs_of_a_filter_are_acted_on_once_that_is_confirmed(manage, jobs, greet, engine, answer):
    for _ in range(3):
        greet.start()
    asked = answer("y")

    text = manage("cancel", "--where", "status=queued,job=greet", "--reason", "too many", "--actor", "ada")

    assert asked == ["Cancel 3 runs? [y/N] "]
    operation = Operation.objects.get()
    assert text == (
        f"Operation {operation.pk} is to cancel 3 runs. How far it is: manage.py jobs operations\n"
    )
    assert (operation.actor, operation.reason) == ("ada", "too many")
    jobs.drain()
    assert set(Run.objects.filter(job_id="greet").values_list("status", "reason")) == {
        ("cancelled", "too many")
    }
    lines = manage("operations").splitlines()
    assert re.match(rf"{operation.pk}  cancel  job=greet,status=queued +completed +.* 3/3", lines[1])


def test_nothing_is_done_to_them_unless_it_is_confirmed(manage, greet, engine, answer):
    greet.start()
    answer("")
    assert manage("cancel", "--where", "job=greet") == "Nothing was done.\n"
    assert not Operation.objects.exists()


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_where_nobody_can_be_asked_it_has_to_be_said(extra, as_json, greet, engine, answer):
    greet.start()
    if extra:
        answer("y")
    line, code = refusal("cancel", "--where", "job=greet", *extra)
    assert (line, code) == ("Cancel 1 run? Say --yes to do so.", 2)

    document = as_json("cancel", "--where", "job=greet", "--where", "until=2100-01-01", "--yes")
    assert (document["verb"], document["total"], document["status"]) == ("cancel", 1, "working")
    assert document["filter"] == {"job": ["greet"], "until": "2100-01-01T00:00:00+00:00"}


@pytest.mark.parametrize(
    ("arguments", "word", "code"),
    [
        (["--where", "jobs=greet"], 'Did you mean "job"', 1),
        (["--where", "job=nobody"], "No such run", 1),
        (["--where", "greet"], "name=value", 2),
        (["--where", "job="], "name=value", 2),
        (["--where", "since=yesterday"], "ISO", 2),
        (["--where", "job=greet", "--alone"], "--alone is for runs that are named", 2),
        ([], "Name runs", 2),
        ([str(uuid4()), "--where", "job=greet"], "one of the two", 2),
    ],
)
def test_a_filter_that_cannot_be_is_one_clear_line(arguments, word, code, greet, engine):
    greet.start()
    line, returncode = refusal("cancel", *arguments, "--yes")
    assert word in line
    assert returncode == code
    assert not Operation.objects.exists()


def test_an_operation_is_aborted(manage, as_json, jobs, greet, engine):
    greet.start()
    assert "No operations yet" in manage("operations")
    manage("cancel", "--where", "job=greet", "--yes")
    operation = Operation.objects.get()

    assert "0 of 1 runs" in manage("abort", operation.pk)

    assert [row["status"] for row in as_json("operations", "--limit", 1)] == ["aborted"]
    assert "is aborted" in refusal("abort", operation.pk)[0]
    assert refusal("abort", "nonsense") == ("There is no operation nonsense.", 1)
    jobs.drain()
    assert Run.objects.get(job_id="greet").status == "completed"


def test_what_an_operation_was_refused_is_shown_beneath_it(manage, jobs, fail, engine, monkeypatch):
    jobs.run(fail)
    monkeypatch.delitem(registry._jobs, "fail")
    manage("retry", "--where", "status=failed", "--yes")
    jobs.drain()

    text = manage("operations")
    assert "cannot go on." in text
    assert max(map(len, text.splitlines())) <= 100


# pause and resume


def test_a_job_is_paused_and_resumed(manage, as_json, jobs, greet):
    assert "those that come wait" in manage("pause", "greet")
    assert re.search(r"greet .* paused +never", manage("list"))
    run = jobs.run(greet)
    assert run.status == "queued"

    assert as_json("resume", "greet")["paused_at"] is None
    jobs.drain()

    run.refresh_from_db()
    assert run.status == "completed"
    assert re.search(r"greet .* on +completed", manage("list"))


def test_a_job_may_be_paused_so_that_new_runs_are_skipped(manage, as_json, jobs, greet):
    document = as_json("pause", "greet", "--skip")
    assert (document["id"], document["pause_mode"]) == ("greet", "skip")
    assert ISO.fullmatch(document["paused_at"])
    assert "paused, skips" in manage("list")
    assert jobs.run(greet).status == "skipped"
    assert as_json("list")[0]["pause_mode"] == "skip"


def test_what_cannot_be_paused_or_resumed_says_why(manage, greet):
    assert refusal("pause", "gret") == ('There is no job "gret".', 1)
    assert refusal("resume", "gret") == ('There is no job "gret".', 1)
    manage("pause", "greet")
    assert "is paused already" in refusal("pause", "greet")[0]
    manage("resume", "greet")
    assert refusal("resume", "greet") == ('Job "greet" is not paused.', 1)


# prune


@pytest.fixture
def old_runs(jobs, greet):
    """A run that ended forty days ago, one of ten days, and one still open since long ago."""
    jobs.run(greet)
    still_open = Run.objects.filter(pk=greet.start().pk)
    still_open.update(wake_at=datetime.now(UTC) + timedelta(days=1000))
    jobs.advance(timedelta(days=30))
    jobs.run(greet)
    jobs.advance(timedelta(days=10))
    return still_open.get()


def left():
    return Run.objects.count()


def test_prune_deletes_what_is_older_than_the_retention(as_json, old_runs):
    assert as_json("prune") == {"runs": 1, "events": 1}
    assert left() == 2


def test_prune_by_days_and_by_instant(manage, as_json, jobs, old_runs):
    assert as_json("prune", "--days", 35) == {"runs": 1, "events": 1}
    instant = (datetime.now(UTC) + timedelta(days=35)).isoformat()
    assert as_json("prune", "--before", instant) == {"runs": 1, "events": 1}
    assert "0 finished runs" in manage("prune", "--days", 0)
    assert Run.objects.get() == old_runs


def test_prune_with_nothing_to_go_by_says_how_to_say_it(manage, old_runs):
    with override_settings(DJANGO_JOBS={"RETENTION_DAYS": None}):
        assert "--days" in manage("prune")
    assert left() == 3


def test_prune_takes_one_bound_only_and_one_that_is_a_bound():
    for arguments in (["--days", "3", "--before", "2030-01-01"], ["--days", "-1"], ["--days", "x"]):
        with pytest.raises(CommandError):
            call_command("jobs", "prune", *arguments)


# how it looks


def test_no_line_of_a_table_is_wider_than_a_terminal(manage, jobs):
    @job("a" * 100, on("long/" + "name" * 20), group="long")
    def long(ctx):
        ctx.step.run("s" * 150, lambda: None)
        raise ValueError("m" * 500)

    run = jobs.run(long)

    for verb in ("list", "runs"):
        assert max(map(len, manage(verb).splitlines())) <= 100
    table = manage("show", run.pk).partition("Steps\n")[2].partition("\nLast traceback")[0]
    assert max(map(len, table.splitlines())) <= 100


def test_statuses_are_coloured_where_colours_are_wanted(manage, jobs, greet, monkeypatch):
    run = jobs.run(greet)
    green = "\x1b[32;1mcompleted\x1b[0m"
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("DJANGO_COLORS", raising=False)

    assert green in manage("runs", "--force-color")
    assert green in manage("show", run.pk, "--force-color")
    assert "\x1b" not in manage("runs", "--no-color")
    assert "\x1b" not in manage("runs")


def test_names_and_messages_cannot_steer_the_terminal(manage, jobs):
    @job("rude")
    def rude(ctx):
        raise NonRetriable("\x1b[2J\rhello\x07")

    class NonRetriable(Exception):
        pass

    text = manage("show", jobs.run(rude).pk)

    assert "hello" in text
    assert not set("\x1b\r\x07") & set(text)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.02, "20 ms"),
        (4.52, "4.5 s"),
        (45, "45 s"),
        (60, "1 min"),
        (3599, "59 min"),
        (7300, "2 h"),
        (86_400, "24 h"),
        (14 * 86_400, "14 d"),
    ],
)
def test_a_length_of_time_is_worded_in_its_largest_unit(seconds, words):
    assert console.span(timedelta(seconds=seconds)) == words


def test_every_status_has_a_place_in_a_table(manage, greet):
    for status in RunStatus.values:
        run = greet.start()
        shape = {"finished_at": run.queued_at, "wake_at": None}
        if status in ("queued", "sleeping", "running"):
            shape = {"lease": uuid4() if status == "running" else None}
        Run.objects.filter(pk=run.pk).update(status=status, **shape)
        assert re.match(rf"greet  {status}\n", manage("show", run.pk))
    assert len(manage("runs").splitlines()) == 1 + len(RunStatus.values)


# as a process


def run_process(*arguments, **environment):
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "testproject.settings", **environment}
    command = [sys.executable, "manage.py", "jobs", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def test_the_process_ends_with_1_and_one_line_where_a_verb_fails(tmp_path):
    database = f"sqlite:///{tmp_path / 'empty.sqlite3'}"
    result = run_process("runs", DATABASE_URL=database)
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr == "CommandError: The database is not migrated. Run manage.py migrate.\n"


def test_the_process_ends_with_2_where_it_is_called_wrongly(tmp_path):
    database = f"sqlite:///{tmp_path / 'empty.sqlite3'}"
    for arguments in ([], ["dance"], ["show"], ["runs", "--limit", "0"], ["emit", "a/b", "--data", "{"]):
        result = run_process(*arguments, DATABASE_URL=database)
        assert result.returncode == 2, arguments
        assert result.stdout == ""
        assert "Traceback" not in result.stderr


def test_a_refusal_under_json_leaves_the_output_empty(tmp_path):
    database = f"sqlite:///{tmp_path / 'empty.sqlite3'}"
    result = run_process("show", "nonsense", "--json", DATABASE_URL=database)
    assert (result.returncode, result.stdout) == (1, "")


def test_a_document_is_plain_ascii_json(manage, jobs, greet):
    emit("user/signed.up", {"name": "Ädá \u2028"})
    jobs.drain()
    text = manage("show", Run.objects.get().pk, "--json")
    assert text.isascii()
    assert json.loads(text)["output"] == "hello Ädá \u2028"


def test_json_may_be_asked_for_before_the_verb_too(manage, greet):
    assert [row["id"] for row in json.loads(manage("--json", "list"))] == ["greet"]


# the reference


PAGE = (ROOT / "docs" / "reference" / "commands.md").read_text()


def options(command, verb=None):
    """List the long options of a command, or of one of its verbs, that Django does not give to every command."""
    parser = command.create_parser("manage.py", "command")
    if verb:
        parser = next(action for action in parser._actions if action.dest == "verb").choices[verb]
    given = {name for action in parser._actions for name in action.option_strings}
    every = BaseCommand().create_parser("manage.py", "command")
    django_s = {name for action in every._actions for name in action.option_strings}
    return sorted(name for name in given - django_s if name.startswith("--"))


VERBS = "list runs show export emit trigger cancel retry replay skip-wait operations abort pause resume prune".split()
VERBS += ["health", "doctor"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_and_its_options_are_in_the_reference(verb):
    section = PAGE.partition(f"\n### {verb}\n")[2].partition("\n### ")[0]
    assert section
    for option in options(jobs_command.Command(), verb):
        assert option in section or option == "--json"


def test_there_is_no_verb_besides():
    parser = jobs_command.Command().create_parser("manage.py", "jobs")
    assert sorted(next(action for action in parser._actions if action.dest == "verb").choices) == sorted(
        VERBS
    )


def test_every_option_of_runjobs_is_in_the_reference():
    section = PAGE.partition("## jobs")[0]
    found = options(runjobs.Command())
    assert {"--workers", "--threads", "--queues", "--once", "--grace", "--reload"} <= set(found)
    assert [option for option in found if f"`{option}" not in section] == []


def test_every_finding_of_the_doctor_is_in_the_reference():
    source = (ROOT / "django_jobs" / "health.py").read_text()
    ids = set(re.findall(r'Finding\(\s*"([a-z-]+)"', source))
    assert "no-worker" in ids
    assert [id for id in ids if f"| `{id}` |" not in PAGE] == []
