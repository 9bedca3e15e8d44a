"""Inngest's own SDK, as it is, sends events to the project over a real connection."""

import asyncio
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace
from urllib.request import Request, urlopen

import inngest
import pytest

from django_jobs import job, on
from django_jobs.models import Event, Run

KEY = "the-key-of-the-shop-0001"


@pytest.fixture(autouse=True)
def _keys(settings, brief_connections):
    settings.DJANGO_JOBS = {"EVENT_KEYS": [KEY]}


@pytest.fixture
def listener():
    return job("listener", on("order/paid"))(lambda ctx: None)


def recorded():
    """The ids of the events there are, in the order they came."""
    return [str(event.pk) for event in Event.objects.order_by("pk")]


def sdk(origin, key=KEY):
    return inngest.Inngest(app_id="shop", event_api_base_url=origin, event_key=key, is_production=True)


@pytest.fixture
def shop(live_server):
    return sdk(live_server.url)


def test_the_sdk_sends_an_event(shop, listener):
    ids = shop.send_sync(inngest.Event(name="order/paid", data={"order": 7}, id="order-7"))

    assert ids == recorded()
    event = Event.objects.get()
    assert (event.name, event.data, event.key) == ("order/paid", {"order": 7}, "order-7")
    assert event.runs.count() == 1


def test_the_sdk_sends_an_event_from_async_code(shop, listener):
    assert asyncio.run(shop.send(inngest.Event(name="order/paid"))) == recorded()


def test_the_sdk_sends_a_hundred_events(shop, listener):
    ids = shop.send_sync([inngest.Event(name="order/paid", data={"n": n}) for n in range(100)])

    events = {str(event.pk): event for event in Event.objects.all()}
    assert [events[id].data["n"] for id in ids] == list(range(100))
    assert Run.objects.count() == 100


def test_the_sdk_says_when_to_hold_a_run(shop, listener):
    tomorrow = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)

    shop.send_sync(inngest.Event(name="order/paid", ts=int(tomorrow.timestamp()) * 1000))

    assert Run.objects.get().wake_at == tomorrow


def test_the_sdk_is_told_of_a_wrong_key(live_server):
    with pytest.raises(Exception, match="key is not known"):
        sdk(live_server.url, key="wrong").send_sync(inngest.Event(name="order/paid"))
    assert recorded() == []


def test_the_sdk_is_told_which_event_is_wrong_and_why(shop):
    with pytest.raises(Exception, match="Event 2 of 2 .* is for triggers"):
        shop.send_sync([inngest.Event(name="order/paid"), inngest.Event(name="order/*")])
    assert recorded() == []


class Forgetful(BaseHTTPRequestHandler):
    """Passes each POST on to ``target``, and loses the first answer."""

    target = ""
    seeds: list[str]

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seeds.append(self.headers["x-inngest-event-id-seed"])
        with urlopen(Request(self.target + self.path, body, dict(self.headers))) as answer:
            said = answer.read()
        if len(self.seeds) > 1:
            self.send_response(answer.status)
            self.end_headers()
            self.wfile.write(said)

    def log_message(self, *args):
        pass


@pytest.fixture
def forgetful(live_server):
    handler = type("Handler", (Forgetful,), {"target": live_server.url, "seeds": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", seeds=handler.seeds)
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_sdk_whose_answer_got_lost_sends_again_and_nothing_is_doubled(forgetful, listener):
    ids = sdk(forgetful.url).send_sync([inngest.Event(name="order/paid"), inngest.Event(name="order/paid")])

    first, second = forgetful.seeds
    assert first == second
    assert ids == recorded()
    assert Event.objects.count() == Run.objects.count() == 2
