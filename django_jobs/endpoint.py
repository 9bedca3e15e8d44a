"""
The HTTP endpoint that takes events. It speaks Inngest's event API, so that Inngest's SDKs can send here.

``urls`` mounts it. Whatever can be wrong with a request is found before anything is written, and said
in the words of the sender; what goes wrong afterwards is ours and ends as any error of a view does.
"""

import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from django.contrib.auth.decorators import login_not_required
from django.http import HttpRequest, HttpResponse, JsonResponse, UnreadablePostError
from django.utils.crypto import constant_time_compare
from django.views.decorators.csrf import csrf_exempt

from . import events
from .conf import conf
from .exceptions import InvalidEvent, JobsError, storable

#: When an SDK sends a request again, this header is the same.
SEED = "x-inngest-event-id-seed"

MAX_ID = 255
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: The years 1980 to 2100, Inngest's bounds of a ``ts``. Outside of them it was no count of milliseconds.
EARLIEST, LATEST = 315_532_800_000, 4_102_444_800_000


class Refused(JobsError):
    """The request is refused, and nothing of it recorded."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


@csrf_exempt  # Whoever knows the key may send; a foreign page does not.
@login_not_required
def receive(request: HttpRequest, key: str) -> HttpResponse:
    """
    Record the events in the body of a POST; answer with their ids, in order.

    All of them or none, in one transaction. Of a request that is sent again, because its answer got
    lost, nothing is recorded twice: it gets the same ids.
    """
    try:
        _admit(request, key)
        specs = list(_specs(_sent(_body(request)), request.headers.get(SEED, "")))
    except Refused as refused:
        return _answer(refused.status, error=str(refused))
    return _answer(200, ids=[str(event.pk) for event in events.emit_many(specs)])


def _answer(status: int, **fields: Any) -> HttpResponse:
    headers = {"Allow": "POST"} if status == 405 else None
    return JsonResponse({**fields, "status": status}, status=status, headers=headers)


def _admit(request: HttpRequest, key: str) -> None:
    keys = _keys()
    if not keys:
        raise Refused(404, 'No events are taken here: there is no key in DJANGO_JOBS["EVENT_KEYS"].')
    if request.method != "POST":
        raise Refused(405, f"Events are sent with POST, not {request.method}.")
    # Not any(): with every key compared, the time it takes does not tell which one it was.
    if not sum(constant_time_compare(key, known) for known in keys):
        raise Refused(401, "The event key is not known here.")


def _keys() -> list[str]:
    """List what opens the endpoint: never the letters of a str, nor the "None" of a variable that is not set."""
    keys = conf.EVENT_KEYS
    return [key for key in keys if isinstance(key, str) and key] if isinstance(keys, list | tuple) else []


# Reading the request.


def _body(request: HttpRequest) -> bytes:
    """Read the body, but no further than the limit, whatever length the sender declares."""
    limit = conf.MAX_HTTP_BYTES
    try:
        if _declared(request) <= limit and len(body := request.read(limit + 1)) <= limit:
            return body
    except UnreadablePostError as error:
        raise Refused(400, f"The body broke off: {error}") from error
    raise Refused(413, f"The body is over the limit of {limit:,} bytes.")


def _declared(request: HttpRequest) -> int:
    try:
        return int(request.META.get("CONTENT_LENGTH") or 0)
    except ValueError:
        return 0


def _sent(body: bytes) -> list[Any]:
    try:
        sent = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"The body cannot be read as JSON: {error}") from error
    if isinstance(sent, dict):
        return [sent]
    if not isinstance(sent, list):
        raise Refused(400, "The body must be an event, which is a JSON object, or a list of events.")
    if len(sent) > conf.MAX_HTTP_EVENTS:
        raise Refused(400, f"{len(sent):,} events are over the limit of {conf.MAX_HTTP_EVENTS:,} a request.")
    return sent


# Reading the events. ``user`` and ``v``, which some SDKs send, have no place to go and are left out.


def _specs(sent: list[Any], seed: str) -> Iterator[events.EventSpec]:
    for place, item in enumerate(sent):
        try:
            spec = _spec(item, _key_of_send(seed, place))
            events.check(spec)
        except (InvalidEvent, TypeError, ValueError) as error:
            which = f"Event {place + 1} of {len(sent)}"
            raise Refused(400, f"{which} cannot be recorded: {error}") from error
        yield spec


def _key_of_send(seed: str, place: int) -> str | None:
    """Return the key that the event at this place has each time its request is sent."""
    return f"send:{hashlib.sha256(seed.encode()).hexdigest()[:32]}:{place}" if seed else None


def _spec(item: Any, key: str | None) -> events.EventSpec:
    if not isinstance(item, dict):
        raise InvalidEvent("it must be an object.")
    name, data = item.get("name"), item.get("data")
    if not isinstance(name, str):
        raise InvalidEvent("its name must be a string.")
    if not isinstance(data, dict | None):
        raise InvalidEvent("its data must be an object.")
    return events.EventSpec(name, data, _id(item.get("id")) or key, _at(item.get("ts")))


def _id(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > MAX_ID or storable(value) != value:
        raise InvalidEvent(f"its id must be a string of at most {MAX_ID} characters, none of them NUL.")
    return value


def _at(ts: Any) -> datetime | None:
    """Return the time a ``ts`` stands for; 0, which some SDKs send for none, is none."""
    is_number = isinstance(ts, int | float) and not isinstance(ts, bool)
    if ts is None or (is_number and ts == 0):
        return None
    if not (is_number and EARLIEST <= ts < LATEST):
        raise InvalidEvent("its ts must be a time between 1980 and 2100, in milliseconds since 1970.")
    return EPOCH + timedelta(milliseconds=ts)
