"""The plain admin: who may look, what is shown, and that nothing can be done."""

from datetime import timedelta
from uuid import uuid4

import pytest
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from django_jobs import NonRetriableError, StepError, admin, clock, emit, job, on, services
from django_jobs.models import Attempt, Event, Job, Log, Run, Step, Worker

pytestmark = pytest.mark.usefixtures("bare_registry")

MODELS = (Run, Event, Job, Worker)


def url(model, page, *args):
    return reverse(f"admin:django_jobs_{model._meta.model_name}_{page}", args=args)


@pytest.fixture
def user(db):
    return User.objects.create_user("ada", password="x", is_staff=True)


@pytest.fixture
def viewer(client, user):
    """A client of somebody who may look at everything here and no more."""
    user.user_permissions.set(
        Permission.objects.filter(content_type__app_label="django_jobs", codename__startswith="view_")
    )
    client.force_login(user)
    return client


@pytest.fixture
def superuser(admin_client):
    return admin_client


@pytest.fixture
def history(jobs):
    """Start runs that show all there is: steps of each kind, failures, a sleep, an error with markup."""

    @job("show-all", on("it/happened"), group="demo", retries=1, backoff=[timedelta(seconds=1)])
    def show_all(ctx):
        """Do a bit of everything."""
        ctx.step.run("fetch", lambda: {"items": ["a", "b"], "mark": "<i>"})
        try:
            ctx.step.using(retries=0).run("flaky", lambda: 1 / 0)
        except StepError:
            pass
        ctx.step.sleep("nap", timedelta(days=1))
        raise NonRetriableError("<script>alert('no')</script>")

    def make(runs=1):
        services.sync()
        made = [emit("it/happened", {"n": n, "html": "<b>"}, key=f"it:{uuid4()}") for n in range(runs)]
        jobs.advance(timedelta(days=2))
        now = clock.now()
        for n in range(runs):
            Worker.objects.create(
                host=f"web-{n}", pid=n, processes=2, threads=4, started_at=now, heartbeat_at=now
            )
        return made

    return make


def one_of(model, rows):
    if model is Event:
        return rows[0]
    return Run.objects.get(event=rows[0]) if model is Run else model.objects.first()


def pages(model, rows):
    return [url(model, "changelist"), url(model, "change", one_of(model, rows).pk)]


# Who may look.


@pytest.mark.parametrize("model", MODELS)
def test_a_stranger_is_sent_to_the_login(client, history, model):
    for page in pages(model, history()):
        assert client.get(page).status_code == 302


@pytest.mark.parametrize("model", MODELS)
def test_staff_without_a_right_may_not_look(client, user, history, model):
    client.force_login(user)
    for page in pages(model, history()):
        assert client.get(page).status_code == 403


@pytest.mark.parametrize("model", MODELS)
def test_who_may_look_sees_every_page(viewer, history, model):
    for page in pages(model, history()):
        assert viewer.get(page).status_code == 200


@pytest.mark.parametrize("model", MODELS)
def test_pages_without_a_row_are_fine_too(superuser, model):
    Job.objects.all().delete()
    assert superuser.get(url(model, "changelist")).status_code == 200
    assert superuser.get(url(model, "change", uuid4())).status_code == 302


def test_the_front_page_offers_nothing_to_add(superuser, history):
    history()
    page = superuser.get(reverse("admin:app_list", args=["django_jobs"])).content.decode()
    assert "Runs" in page
    assert "/add/" not in page


# Nothing can be done.


@pytest.mark.parametrize("model", MODELS)
def test_not_even_a_superuser_can_add_change_or_delete(superuser, history, model):
    row = one_of(model, history())
    before = list(model.objects.order_by("pk").values())
    targets = [url(model, "add"), url(model, "delete", row.pk), url(model, "change", row.pk)]

    codes = [superuser.post(target, {"post": "yes", "status": "completed"}).status_code for target in targets]
    bulk = {"action": "delete_selected", "_selected_action": row.pk, "post": "yes"}
    superuser.post(url(model, "changelist"), bulk)

    assert codes == [403, 403, 403]
    assert list(model.objects.order_by("pk").values()) == before


@pytest.mark.parametrize("model", MODELS)
def test_no_page_has_a_button_that_would_write(superuser, history, model):
    for page in pages(model, history()):
        html = superuser.get(page).content.decode()
        for name in ("_save", "_continue", "_addanother", "action-checkbox", "deletelink"):
            assert f'"{name}"' not in html


# What is shown.


def page_of(client, row):
    return client.get(url(type(row), "change", row.pk)).content.decode()


def test_a_run_shows_its_steps_its_failures_and_its_event(viewer, history):
    [event] = history()
    run = event.runs.get()

    page = page_of(viewer, run)

    for name in ("fetch", "flaky", "nap"):
        assert f"<p>{name}</p>" in page
    assert "ZeroDivisionError: division by zero" in page
    assert page.count("Traceback (most recent call last)") >= 3
    assert url(Event, "change", event.pk) in page


def test_a_run_shows_the_steps_that_the_code_no_longer_has(viewer, jobs):
    @job("changes")
    def changes(ctx):
        if not Step.objects.exists():
            ctx.step.run("removed", str)
        ctx.step.sleep("nap", timedelta(days=1))

    run = jobs.run(changes)
    jobs.advance(timedelta(days=1))
    html = viewer.get(url(Run, "change", run.pk)).content.decode()

    assert "Unvisited" in html
    assert html.count("icon-yes") == 1


def test_an_event_shows_its_data_and_the_runs_it_started(viewer, history):
    [event] = history()
    page = page_of(viewer, event)
    assert "&quot;n&quot;: 0" in page
    assert url(Run, "change", event.runs.get().pk) in page


def test_a_job_leads_to_its_runs(viewer, history):
    history()
    page = page_of(viewer, Job.objects.get(pk="show-all"))
    target = url(Run, "changelist") + "?job_id=show-all"
    assert f'href="{target}"' in page
    assert viewer.get(target).context["cl"].result_count == 1


def test_markup_in_payloads_and_errors_is_shown_and_not_obeyed(viewer, history):
    [event] = history()
    for row in (event, event.runs.get()):
        page = page_of(viewer, row)
        assert "<script>alert" not in page
        assert "<b>" not in page.partition("<pre")[2]
    assert "&lt;script&gt;alert" in page


def test_a_very_long_result_is_cut_off_with_its_length(viewer, jobs):
    @job("long")
    def long(ctx):
        return "x" * 10_000

    page = page_of(viewer, jobs.run(long))

    assert "10,002 characters" in page
    assert "x" * 2_500 not in page


def test_a_run_with_very_many_steps_shows_the_first(viewer, jobs):
    @job("many")
    def many(ctx):
        for n in range(admin.MOST_ROWS + 20):
            ctx.step.run(f"step-{n}", int)

    page = page_of(viewer, jobs.run(many))

    assert f"<p>step-{admin.MOST_ROWS - 1}</p>" in page
    assert f"<p>step-{admin.MOST_ROWS}</p>" not in page


def test_a_run_shows_what_it_said(viewer, jobs):
    @job("talks")
    def talks(ctx):
        ctx.step.run("call", lambda: ctx.logger.warning("slow <b>today</b>"))

    page = page_of(viewer, jobs.run(talks))

    assert "slow &lt;b&gt;today&lt;/b&gt;" in page
    assert "<p>WARNING</p>" in page
    assert "django_jobs.job.talks" in page


def test_a_run_that_said_very_much_shows_the_last_of_it_in_order(viewer, jobs):
    @job("talks")
    def talks(ctx):
        for n in range(admin.MOST_ROWS + 20):
            ctx.logger.info("line %s", n)

    page = page_of(viewer, jobs.run(talks))

    assert ">line 19<" not in page
    assert -1 < page.index(">line 20<") < page.index(f">line {admin.MOST_ROWS + 19}<")


def test_a_worker_that_fell_silent_is_not_alive(viewer, history):
    history()
    now = clock.now()
    Worker.objects.create(
        host="gone", pid=9, processes=1, threads=1, started_at=now, heartbeat_at=now - timedelta(minutes=5)
    )
    page = viewer.get(url(Worker, "changelist")).content.decode()
    assert page.count("icon-yes.svg") == 1
    assert page.count("icon-no.svg") == 1


# Finding.


def found(client, model, **query):
    return [row.pk for row in client.get(url(model, "changelist"), query).context["cl"].result_list]


def test_runs_are_found_by_exact_id_and_by_the_beginning_of_the_job_s(viewer, history, jobs):
    first, second = (event.runs.get().pk for event in history(runs=2))

    assert found(viewer, Run, q=str(first)) == [first]
    assert found(viewer, Run, q=f" {str(second).upper()} ") == [second]
    assert found(viewer, Run, q="show-") == [second, first]
    assert found(viewer, Run, q="all") == []
    assert found(viewer, Run, q=str(uuid4())) == []


def test_events_and_jobs_are_found_by_the_beginning_of_their_names(viewer, history):
    [event] = history()
    assert found(viewer, Event, q="it/") == [event.pk]
    assert found(viewer, Event, q=str(event.pk)) == [event.pk]
    assert found(viewer, Job, q="show-a") == ["show-all"]


def test_runs_are_filtered_by_status_job_and_date(viewer, history, jobs):
    [event] = history()
    run = event.runs.get()

    @job("other")
    def other(ctx):
        pass

    done = jobs.run(other)
    services.sync()

    assert found(viewer, Run, status__exact="failed") == [run.pk]
    assert found(viewer, Run, job_id="other") == [done.pk]
    assert found(viewer, Run, job_id="show-all", status__exact="completed") == []
    assert set(found(viewer, Run, queued_at__gte=run.queued_at.isoformat())) == {run.pk, done.pk}
    assert found(viewer, Run, queued_at__gte=(clock.now() + timedelta(days=1)).isoformat()) == []


# What it costs.


def queries(client, target):
    with CaptureQueriesContext(
        connection,
    ) as captured:
        assert client.get(target).status_code == 200
    return [query["sql"] for query in captured]


@pytest.mark.parametrize("model", MODELS)
def test_a_list_of_thirty_takes_as_many_queries_as_a_list_of_one(viewer, history, model):
    target = url(model, "changelist")
    history()
    viewer.get(target)  # The first page looks up content types.
    few = queries(viewer, target)
    history(runs=29)
    Job.objects.bulk_create(Job(id=f"job-{n}", synced_at=clock.now()) for n in range(29))

    assert len(queries(viewer, target)) == len(few)


@pytest.mark.parametrize("model", [Run, Event])
def test_a_page_of_many_rows_takes_as_many_queries_as_one_of_few(viewer, history, model):
    [event] = history()
    run = event.runs.get()
    target = url(model, "change", one_of(model, [event]).pk)
    viewer.get(target)
    few = queries(viewer, target)
    now = clock.now()
    steps = Step.objects.bulk_create(
        Step(run=run, name=f"more-{n}", kind="run", status="completed", started_at=now, finished_at=now)
        for n in range(30)
    )
    Attempt.objects.bulk_create(
        Attempt(run=run, step=step, number=1, error={"type": "E"}, started_at=now, finished_at=now)
        for step in steps
    )
    Log.objects.bulk_create(
        Log(run=run, number=n, level=20, logger="a", message="b", at=now) for n in range(1, 31)
    )
    Run.objects.bulk_create(
        Run(job_id="show-all", event=event, queued_at=now, wake_at=now) for _ in range(30)
    )

    assert len(queries(viewer, target)) == len(few)


@pytest.mark.parametrize("model", [Run, Event])
def test_a_list_reads_no_payload(viewer, history, model):
    history()
    table = model._meta.db_table
    read = [sql for sql in queries(viewer, url(model, "changelist")) if f"{table}" in sql]
    quote = connection.ops.quote_name
    for column in ("output", "error", "data"):
        assert not [sql for sql in read if f"{quote(table)}.{quote(column)}" in sql]
    assert [sql for sql in read if "ORDER BY" in sql]


def test_a_long_list_comes_in_pages_of_fifty_newest_first(viewer, jobs):
    @job("short")
    def short(ctx):
        pass

    runs = [short.start().pk for _ in range(60)]

    assert found(viewer, Run) == runs[:9:-1]
    assert found(viewer, Run, p=2) == runs[9::-1]
