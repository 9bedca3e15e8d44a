"""Events over HTTP: what is taken and what is refused."""

import asyncio
import json
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest
from asgiref.testing import ApplicationCommunicator
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.handlers.asgi import ASGIRequest
from django.test import Client, RequestFactory, override_settings
from django.urls import reverse

from django_jobs import conf, endpoint, job, on
from django_jobs.models import Event, Run
from django_jobs.testing import now

KEY = "the-first-key-of-two-00001"
OTHER_KEY = "the-second-key-of-two-0002"
SEED = "1743130137367,eii2YKXRVTJPuA=="


def with_settings(**changes):
    return override_settings(DJANGO_JOBS={"EVENT_KEYS": [OTHER_KEY, KEY], **changes})


@pytest.fixture(autouse=True)
def _keys():
    with with_settings():
        yield


@pytest.fixture
def listener():
    @job("listener", on("order/paid"))
    def listener(ctx):
        return ctx.event.data

    return listener


@pytest.fixture
def send(jobs):
    """POST a body, as JSON unless it is bytes; return the answer."""

    def send(body, key=KEY, seed=None, client=None, **options):
        headers = {"x-inngest-event-id-seed": seed} if seed else {}
        text = body if isinstance(body, bytes) else json.dumps(body)
        options = {"content_type": "application/json", "headers": headers, **options}
        return (client or Client()).post(f"/e/{key}", text, **options)

    return send


def ids_of(answer):
    assert answer.status_code == 200, answer.content
    assert answer.json() == {"ids": answer.json()["ids"], "status": 200}
    return answer.json()["ids"]


def recorded():
    """The ids of the events there are, in the order they came."""
    return [str(event.pk) for event in Event.objects.order_by("pk")]


def error_of(answer, status):
    """The answer's error, which must be one of this status that left nothing behind."""
    assert answer.status_code == status, answer.content
    assert answer.headers["Content-Type"] == "application/json"
    said = answer.json()
    assert said == {"error": said["error"], "status": status}
    assert not Event.objects.exists()
    assert not Run.objects.exists()
    return said["error"]


# What is taken.


def test_an_event_is_recorded_and_starts_the_jobs_that_listen(send, jobs, listener):
    [id] = ids_of(send({"name": "order/paid", "data": {"order": 7}}))

    event = Event.objects.get()
    assert (str(event.pk), event.name, event.data, event.key) == (id, "order/paid", {"order": 7}, None)
    jobs.drain()
    assert event.runs.get().output == {"order": 7}


def test_a_list_of_events_gets_its_ids_in_order(send, listener):
    ids = ids_of(send([{"name": "order/paid", "data": {"order": n}} for n in range(100)]))

    events = {str(event.pk): event for event in Event.objects.all()}
    assert [events[id].data["order"] for id in ids] == list(range(100))
    assert Run.objects.count() == 100


def test_no_events_are_no_events(send):
    assert ids_of(send([])) == []
    assert not Event.objects.exists()


@pytest.mark.parametrize(
    "extra", [{}, {"data": None}, {"id": None, "ts": None}, {"id": "", "ts": 0}], ids=str
)
def test_a_name_is_all_that_an_event_needs(extra, send):
    ids_of(send({"name": "order/paid", **extra}))

    event = Event.objects.get()
    assert (event.data, event.key, event.occurred_at) == ({}, None, now())


def test_fields_that_have_no_place_here_are_left_out(send):
    ids_of(send({"name": "order/paid", "user": {"id": 7}, "v": "2024-01-01", "meta": {"sessions": []}}))

    assert Event.objects.get().data == {}


def test_data_is_what_was_sent_whatever_it_looks_like(send):
    data = {"price": {"$decimal": "9.90"}, "text": "čšž €", "deep": [[{"a": [None, True, 1.5, 10**30]}]]}

    ids_of(send({"name": "order/paid", "data": data}))

    assert Event.objects.get().data == data


@pytest.mark.parametrize(
    "encode", [str.encode, lambda text: b"\xef\xbb\xbf" + text.encode()], ids=["plain", "mark"]
)
@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain"])
def test_json_is_taken_whatever_it_says_it_is(content_type, encode, send):
    ids_of(send(encode('{"name": "order/paid"}'), content_type=content_type))


def test_the_path_has_a_name():
    assert reverse("django_jobs:events", args=[KEY]) == f"/e/{KEY}"


# Id and seed.


def test_the_id_of_an_event_is_its_key(send, listener):
    first = ids_of(send({"name": "order/paid", "data": {"n": 1}, "id": "order-7"}))
    second = ids_of(send({"name": "order/paid", "data": {"n": 2}, "id": "order-7"}))

    assert first == second
    event = Event.objects.get()
    assert (event.key, event.data) == ("order-7", {"n": 1})
    assert Run.objects.count() == 1


def test_a_request_sent_again_is_recorded_once_and_gets_the_same_ids(send, listener):
    batch = [{"name": "order/paid", "data": {"n": n // 2}} for n in range(6)]

    first, second = ids_of(send(batch, seed=SEED)), ids_of(send(batch, seed=SEED))

    assert first == second
    assert len(set(first)) == Event.objects.count() == Run.objects.count() == 6


def test_another_seed_is_another_request(send):
    event = {"name": "order/paid"}
    assert ids_of(send(event, seed=SEED)) != ids_of(send(event, seed="1743130137368,eii2YKXRVTJPuA=="))


def test_without_a_seed_every_request_is_another(send):
    assert ids_of(send({"name": "order/paid"})) != ids_of(send({"name": "order/paid"}))


def test_the_id_of_an_event_counts_for_more_than_the_seed(send):
    event = {"name": "order/paid", "id": "order-7"}
    assert ids_of(send([event], seed=SEED)) == ids_of(send([{"name": "order/sent"}, event]))[1:]


def test_a_seed_may_be_any_text(send):
    seed = "č, not what an SDK sends " * 100
    assert ids_of(send({"name": "order/paid"}, seed=seed)) == ids_of(send({"name": "order/paid"}, seed=seed))


@pytest.mark.django_db(transaction=True)
def test_of_one_request_that_arrives_several_times_at_once_one_is_recorded(send, listener, at_once):
    batch = [{"name": "order/paid", "data": {"n": n}} for n in range(20)]

    answers = at_once(lambda: ids_of(send(batch, seed=SEED)))

    assert answers == [answers[0]] * 4
    assert Event.objects.count() == Run.objects.count() == 20


# Ts.


def milliseconds(instant):
    return (instant - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


@pytest.mark.parametrize(
    "at",
    [datetime(1980, 1, 1, tzinfo=UTC), datetime(2025, 3, 27, 16, 48, 57, 367000, tzinfo=UTC)],
    ids=["1980", "2025"],
)
def test_an_event_of_the_past_keeps_its_time_and_starts_its_jobs_now(at, send, listener):
    ids_of(send({"name": "order/paid", "ts": milliseconds(at)}))

    event = Event.objects.get()
    assert (event.occurred_at, event.received_at) == (at, now())
    assert event.runs.get().wake_at == now()


def test_an_event_of_the_future_holds_its_runs_until_then(send, jobs, listener):
    jobs.travel_to(datetime(2040, 1, 1, tzinfo=UTC))
    ids_of(send({"name": "order/paid", "ts": milliseconds(now() + timedelta(days=1))}))

    jobs.advance(timedelta(hours=23))
    assert Run.objects.get().status == "queued"
    jobs.advance(timedelta(hours=1))
    assert Run.objects.get().status == "completed"


def test_fractions_of_a_millisecond_are_kept(send):
    ids_of(send({"name": "order/paid", "ts": 1743130137367.25}))
    assert Event.objects.get().occurred_at.microsecond == 367_250


@pytest.mark.parametrize(
    "ts",
    [
        "1743130137",
        "-1",
        "315532799999",
        "4102444800000",
        "1e999",
        "NaN",
        "9" * 400,
        '"0"',
        "true",
        "false",
        "[]",
    ],
)
def test_a_ts_that_is_no_likely_time_is_refused(ts, send):
    error = error_of(send(b'{"name": "order/paid", "ts": %s}' % ts.encode()), 400)
    assert "its ts must be a time between 1980 and 2100, in milliseconds" in error


# Who may send.


@pytest.mark.parametrize("key", [KEY, OTHER_KEY])
def test_each_of_the_keys_may_send(key, send):
    assert len(ids_of(send({"name": "order/paid"}, key=key))) == 1


@pytest.mark.parametrize("key", ["wrong", KEY[:-1], KEY + "0", KEY.upper(), "%00", "%E2%82%AC", "%FF"])
def test_a_wrong_key_is_turned_away(key, send):
    assert "key" in error_of(send({"name": "order/paid"}, key=key), 401)


def test_a_wrong_key_is_turned_away_before_the_body_is_looked_at(send):
    error_of(send(b"no JSON", key="wrong"), 401)


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ([], KEY),
        ((), KEY),
        ([""], KEY),
        ([None], "None"),
        (None, "None"),
        ([7], "7"),
        ("letters", "l"),
        ({"k": "k"}, "k"),
    ],
    ids=repr,
)
def test_without_a_key_in_the_settings_there_is_no_endpoint(keys, key, send):
    with with_settings(EVENT_KEYS=keys):
        assert "EVENT_KEYS" in error_of(send({"name": "order/paid"}, key=key), 404)


def test_keys_may_be_a_tuple_and_what_is_none_of_them_is_passed_over(send):
    with with_settings(EVENT_KEYS=(None, KEY)):
        ids_of(send({"name": "order/paid"}))
        assert send({"name": "order/paid"}, key="None").status_code == 401


@pytest.mark.parametrize("method", ["get", "put", "patch", "delete", "options"])
def test_only_post_sends(method, send, client):
    answer = getattr(client, method)(f"/e/{KEY}")
    assert method.upper() in error_of(answer, 405)
    assert answer.headers["Allow"] == "POST"


def test_no_csrf_token_is_asked_for(send):
    ids_of(send({"name": "order/paid"}, client=Client(enforce_csrf_checks=True)))


def test_a_project_that_asks_everybody_to_log_in_does_not_ask_here(send):
    asking = [*settings.MIDDLEWARE, "django.contrib.auth.middleware.LoginRequiredMiddleware"]
    with override_settings(MIDDLEWARE=asking):
        ids_of(send({"name": "order/paid"}))


# What is refused: all of it, whatever else is in the request.

GOOD = {"name": "order/paid", "data": {"order": 7}}


@pytest.mark.parametrize(
    "body",
    [b"", b" ", b"{", b"[{}", b'{"name": "a"} {}', b"\xff\xfe\xff", b"[" * 100_000, b"9" * 10_000, b"hello"],
)
def test_what_is_not_json_is_refused(body, send):
    assert "JSON" in error_of(send(body), 400)


@pytest.mark.parametrize("body", ["order/paid", 7, None, True])
def test_json_that_is_neither_an_event_nor_a_list_is_refused(body, send):
    assert "a list of events" in error_of(send(body), 400)


@pytest.mark.parametrize(
    ("event", "why"),
    [
        ("order/paid", "must be an object"),
        (None, "must be an object"),
        ([GOOD], "must be an object"),
        ({}, "its name must be a string"),
        ({"name": None}, "its name must be a string"),
        ({"name": 7}, "its name must be a string"),
        ({"name": ""}, "the name is empty"),
        ({"name": "x" * 256}, "at most 255"),
        ({"name": "order/*"}, "* is for triggers"),
        ({"name": "order\0paid"}, "control character"),
        ({"name": "order/\ud800"}, "control character"),
        ({"name": "django_jobs/job.started"}, "the engine's own"),
        ({**GOOD, "data": []}, "its data must be an object"),
        ({**GOOD, "data": [1]}, "its data must be an object"),
        ({**GOOD, "data": ""}, "its data must be an object"),
        ({**GOOD, "data": 0}, "its data must be an object"),
        ({**GOOD, "data": {"lines": [{"text": "a\0b"}]}}, ".lines[0].text is a string with a NUL"),
        ({**GOOD, "data": {"text": "\ud800"}}, ".text is a string with a lone surrogate"),
        ({**GOOD, "data": {"n": float("nan")}}, ".n is nan"),
        ({**GOOD, "data": {"text": "x" * 600_000}}, "over the limit of 524,288"),
        ({**GOOD, "id": 7}, "its id must be a string"),
        ({**GOOD, "id": False}, "its id must be a string"),
        ({**GOOD, "id": ["a"]}, "its id must be a string"),
        ({**GOOD, "id": "x" * 256}, "at most 255 characters"),
        ({**GOOD, "id": "a\0b"}, "its id must be a string"),
        ({**GOOD, "id": "\ud800"}, "its id must be a string"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_event_that_cannot_be_recorded_and_none_is(event, why, send, listener):
    error = error_of(send([GOOD, event, GOOD], seed=SEED), 400)

    assert error.startswith("Event 2 of 3 cannot be recorded: ")
    assert why in error


def test_data_nested_too_deep_is_refused(send):
    body = b'{"name": "order/paid", "data": %s1%s}' % (b'{"a":' * 200, b"}" * 200)
    assert "deeper" in error_of(send(body), 400)


def test_too_many_events_are_refused(send, listener):
    with with_settings(MAX_HTTP_EVENTS=2):
        assert "3 events are over the limit of 2" in error_of(send([GOOD] * 3), 400)
        assert len(ids_of(send([GOOD] * 2))) == 2


def test_five_thousand_events_are_not_too_many(send):
    assert len(set(ids_of(send([{"name": "order/paid"}] * conf.Defaults.MAX_HTTP_EVENTS)))) == 5000


def test_a_body_that_is_too_large_is_refused(send):
    body = json.dumps(GOOD).encode()
    with with_settings(MAX_HTTP_BYTES=len(body)):
        assert f"{len(body)} bytes" in error_of(send(body + b" "), 413)
        ids_of(send(body))


class Stream:
    """A body as a server hands it over: as long as one likes, or broken off."""

    readline = None

    def __init__(self, *, breaks=False):
        self.was_read = 0
        self.breaks = breaks

    def read(self, size=1_000_000):
        if self.breaks:
            raise ConnectionResetError("The sender hung up.")
        self.was_read += size
        return b"x" * size

    def close(self):
        pass

    def arrive(self, declared):
        environ = {"CONTENT_LENGTH": declared, "wsgi.input": self}
        return endpoint.receive(RequestFactory().generic("POST", "/", **environ), KEY)


@pytest.mark.parametrize(
    ("declared", "status", "was_read"),
    [("11", 413, 0), ("10", 400, 10), ("-1", 400, 0), ("", 400, 0), ("ten", 400, 0)],
)
def test_no_more_is_read_than_is_declared_and_within_the_limit(declared, status, was_read):
    stream = Stream()
    with with_settings(MAX_HTTP_BYTES=10):
        assert stream.arrive(declared).status_code == status
    assert stream.was_read == was_read


def test_a_body_of_no_declared_length_is_read_one_byte_past_the_limit():
    stream = Stream()
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": []}
    with with_settings(MAX_HTTP_BYTES=10), closing(ASGIRequest(scope, stream)) as request:
        assert endpoint.receive(request, KEY).status_code == 413
    assert stream.was_read == 11


def test_a_body_that_breaks_off_is_refused():
    answer = Stream(breaks=True).arrive("100")

    assert answer.status_code == 400
    assert "hung up" in json.loads(answer.content)["error"]


@pytest.mark.django_db(transaction=True)
def test_what_goes_wrong_here_is_not_blamed_on_the_sender_and_nothing_is_recorded(send, listener):
    job("misspelt", on("order/sent"), gate="paymnt.enabled")(lambda ctx: None)

    answer = send([GOOD, {"name": "order/sent"}], client=Client(raise_request_exception=False))

    assert answer.status_code == 500
    assert not Event.objects.exists()
    assert not Run.objects.exists()


# Under ASGI.


def arrive_by_asgi(*chunks):
    """Send a request of no declared length to the project's ASGI application; return what it answers."""
    headers = [(b"host", b"localhost")]
    scope = {"type": "http", "method": "POST", "path": f"/e/{KEY}", "query_string": b"", "headers": headers}

    async def call():
        application = ApplicationCommunicator(get_asgi_application(), scope)
        for place, chunk in enumerate(chunks, 1):
            more = place < len(chunks)
            await application.send_input({"type": "http.request", "body": chunk, "more_body": more})
        start = await application.receive_output(timeout=30)
        body = await application.receive_output(timeout=30)
        await application.wait()
        return start["status"], json.loads(body["body"])

    return asyncio.run(call())


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("brief_connections")
def test_events_are_taken_under_asgi(listener):
    status, said = arrive_by_asgi(b'[{"name": "order/paid"},', b' {"name": "order/paid"}]')

    assert (status, said) == (200, {"ids": recorded(), "status": 200})
    assert Run.objects.count() == 2


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("brief_connections")
def test_a_body_of_no_declared_length_has_the_same_limit(listener):
    with with_settings(MAX_HTTP_BYTES=30):
        status, said = arrive_by_asgi(b'{"name": "order/paid"}', b" " * 9)

    assert (status, said) == (413, {"error": "The body is over the limit of 30 bytes.", "status": 413})
    assert recorded() == []
