import json
import math
import subprocess
import sys
import uuid
from collections import Counter, OrderedDict, namedtuple
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from pathlib import PurePosixPath
from zoneinfo import ZoneInfo

import pytest
from django.contrib.auth.models import User
from django.db.models import IntegerChoices, Model, QuerySet, TextChoices
from django.http import QueryDict
from django.utils.functional import SimpleLazyObject, lazystr
from hypothesis import given, settings
from hypothesis import strategies as st

from django_jobs.payloads import check_size, dumps, loads, roundtrip

WHERE = 'step "charge-card"'

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
# In whole seconds, as in any zone there is: CPython's fromisoformat takes an offset below one second for UTC.
offsets = st.integers(-86_399, 86_399).map(lambda seconds: timezone(timedelta(seconds=seconds)))
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
    | st.datetimes()
    | st.datetimes(timezones=offsets)
    | st.dates()
    | st.times()
    | st.times(timezones=offsets)
    | st.timedeltas()
    | st.decimals(allow_nan=False)
    | st.uuids()
    | st.binary()
)
hashables = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
keys = texts | st.sampled_from(["$", "$dict", "$tuple", "$decimal", "$unheard.of"])
values = st.recursive(
    hashables,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.sets(hashables, max_size=4)
    ),
    max_leaves=12,
)


def same(one, other):
    """Equal, and of the same types all the way down: 1, 1.0 and True are three things here."""
    if type(one) is not type(other) or one != other:
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return all(map(same, one, other))
    if isinstance(one, datetime | time):
        return one.utcoffset() == other.utcoffset()
    return True


def refusal(value):
    with pytest.raises(TypeError) as caught:
        dumps(value, where=WHERE)
    return str(caught.value)


@given(values)
@settings(max_examples=300)
def test_what_is_loaded_is_what_was_dumped_type_by_type(value):
    text = dumps(value, where=WHERE)
    assert same(loads(text), value)
    assert dumps(loads(text), where=WHERE) == text
    json.loads(text, parse_constant=pytest.fail)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | texts, lambda inner: st.lists(inner), max_leaves=9
    )
)
def test_plain_values_are_plain_json(value):
    assert dumps({"it": value}, where=WHERE) == json.dumps(
        {"it": value}, ensure_ascii=False, separators=(",", ":")
    )


def test_the_text_is_compact_readable_and_in_the_order_given():
    value = {"user": "Zoë", "amount": Decimal("9.90"), "at": datetime(2026, 3, 1, 12, tzinfo=UTC)}
    text = '{"user":"Zoë","amount":{"$decimal":"9.90"},"at":{"$datetime":"2026-03-01T12:00:00+00:00"}}'
    assert dumps(value, where=WHERE) == text


def test_equal_sets_have_equal_texts():
    # 0 and 1024 fall into one place of the hash table, where the first to come goes first.
    assert list({0, 1024}) != list({1024, 0})
    assert dumps({0, 1024}, where=WHERE) == dumps({1024, 0}, where=WHERE)


@pytest.mark.parametrize(
    "value",
    [
        {"$decimal": "9.90"},
        {"$dict": [["a", 1]]},
        {"$dict": {"$dict": {"$tuple": [1]}}},
        {"$unheard.of": None},
        {"$": Decimal(1)},
        {"$set": 1, "$tuple": 2},
        [{"$date": (1, {"$date": {2}})}],
        "$decimal",
        '{"$decimal":"1"}',
    ],
)
def test_a_value_that_looks_like_our_tags_survives(value):
    assert same(roundtrip(value, where=WHERE), value)


def test_big_and_odd_numbers_are_exact():
    for value in (
        2**63 + 1,
        -(10**400),
        0.1,
        -0.0,
        5e-324,
        Decimal("1E+30"),
        Decimal("0.10"),
        Decimal("-Infinity"),
    ):
        assert repr(roundtrip(value, where=WHERE)) == repr(value)
    assert roundtrip(Decimal("NaN"), where=WHERE).is_nan()


@pytest.mark.parametrize("fold", [0, 1])
def test_a_zoned_datetime_keeps_its_instant_in_the_hour_that_comes_twice(fold):
    zoned = datetime(2026, 10, 25, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=fold)
    loaded = roundtrip(zoned, where=WHERE)
    assert loaded.astimezone(UTC) == zoned.astimezone(UTC)
    assert loaded.utcoffset() == zoned.utcoffset()


def test_a_naive_datetime_stays_naive():
    assert roundtrip(datetime(2026, 1, 1), where=WHERE).tzinfo is None


class Colour(StrEnum):
    RED = "red"


class Size(IntEnum):
    BIG = 3


class Plan(TextChoices):
    PRO = "pro"


class Level(IntegerChoices):
    TOP = 9


class Name(str):
    pass


class Moment(datetime):
    pass


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Colour.RED, "red"),
        (Size.BIG, 3),
        (Plan.PRO, "pro"),
        (Level.TOP, 9),
        (Name("ada"), "ada"),
        (lazystr("hello"), "hello"),
        (Moment(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC)),
        (OrderedDict(a=1), {"a": 1}),
        (Counter("aab"), {"a": 2, "b": 1}),
        (namedtuple("Point", "x y")(1, 2), (1, 2)),
        ({Colour.RED: {Plan.PRO}}, {"red": {"pro"}}),
        ([True, False, None], [True, False, None]),
    ],
)
def test_a_subclass_becomes_the_plain_type(value, plain):
    assert same(roundtrip(value, where=WHERE), plain)


def test_a_copy_shares_nothing_with_the_value():
    value = {"items": [1]}
    copy = roundtrip(value, where=WHERE)
    copy["items"].append(2)
    assert value == {"items": [1]}


class Shape(Enum):
    ROUND = 1


@dataclass
class Invoice:
    number: int


class Opaque:
    pass


async def coroutine():
    pass


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (Model.__new__(Model), "is a Model, which JSON cannot hold; return its primary key instead"),
        (SimpleLazyObject(lambda: Model.__new__(Model)), "return its primary key"),
        (QuerySet(), "a list of plain values"),
        (QueryDict("a=1&a=2"), "dict(value.lists())"),
        (Shape.ROUND, "its .value"),
        (Invoice(1), "dataclasses.asdict(value)"),
        (PurePosixPath("/tmp"), "its str()"),
        (ValueError("no"), "its str()"),
        ((number for number in [1]), "a list of its items"),
        ({}.keys(), "a list of its items"),
        (range(3), "a list of its items"),
        (len, "what it returns"),
        (Opaque, "what it returns"),
        (User.__new__(User), "is a User, which"),
        (Opaque(), "is an Opaque, which JSON cannot hold; return JSON values"),
        (bytearray(b"x"), "is a bytearray"),
        (SimpleLazyObject(lambda: "text"), "is a SimpleLazyObject"),
        (1 + 2j, "is a complex"),
        (math.nan, "is nan"),
        (-math.inf, "is -inf"),
        ("a\0b", "NUL"),
        ("\ud800", "lone surrogate"),
        ("é\ud800", "lone surrogate"),
        ({"a\0": 1}, "has a key with a NUL"),
        ({"\udfff": 1}, "has a key with a lone surrogate"),
        pytest.param(10**5000, "more digits", id="a huge int"),
        (time(12, tzinfo=ZoneInfo("Europe/Berlin")), "offset depends on the day"),
        ({7: 1}, "has the key 7 (int)"),
        ({None: 1}, "has the key None (NoneType)"),
        ({(1, 2): 1}, "has the key (1, 2) (tuple)"),
    ],
)
def test_what_json_cannot_hold_is_refused_with_what_to_return_instead(value, said):
    assert said in refusal(value)
    assert refusal(value).startswith(f"{WHERE}: the value ")
    assert refusal({"items": [0, {"user": value}]}).startswith(f"{WHERE}: .items[1].user ")


def test_a_coroutine_is_to_be_awaited():
    unawaited = coroutine()
    assert "what it gives when awaited" in refusal([unawaited])
    unawaited.close()


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"items": [0, 1, 2, {"user": Opaque()}]}, ".items[3].user"),
        ([[Opaque()]], "[0][0]"),
        ((1, Opaque()), "[1]"),
        ({"a b": {"": Opaque()}}, '["a b"][""]'),
        ({"tags": {Shape.ROUND}}, ".tags{}"),
        ({"$dict": Opaque()}, '["$dict"]'),
        ({"by": {"id": {7: "x"}}}, ".by.id"),
        ({"text": ["fine", "not\0fine"]}, ".text[1]"),
        ({"rates": {"eur": [1.0, math.inf]}}, ".rates.eur[1]"),
        ({"at": datetime(2026, 1, 1), "what": Opaque()}, ".what"),
    ],
)
def test_a_refusal_names_the_path(value, path):
    assert refusal(value).startswith(f"{WHERE}: {path} ")


def test_a_backslash_before_u0000_is_text_like_any_other():
    assert roundtrip("\\u0000", where=WHERE) == "\\u0000"


def test_a_list_that_contains_itself_is_refused():
    endless = [1]
    endless.append({"again": endless})
    assert refusal(endless).startswith(f"{WHERE}: [1].again contains itself")


def test_one_list_in_two_places_is_no_loop():
    row = [Decimal(1)]
    assert roundtrip([row, row], where=WHERE) == [row, row]


def nested(depth, innermost):
    value = innermost
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("innermost", [1, Decimal(1)])
def test_a_hundred_levels_fit_and_more_are_refused(innermost):
    assert roundtrip(nested(100, innermost), where=WHERE) == nested(100, innermost)
    assert "nested deeper than 100 levels" in refusal(nested(101, innermost))
    assert "nested deeper than 100 levels" in refusal(nested(100_000, innermost))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Expecting value"),
        ("[1,]", "."),
        ("NaN", "NaN is not JSON"),
        ("[Infinity]", "Infinity is not JSON"),
        ('{"$date":"tomorrow"}', r"Not a \$date: 'tomorrow'"),
        ('{"$decimal":"many"}', r"Not a \$decimal"),
        ('{"$bytes":"?"}', r"Not a \$bytes"),
        ('{"$set":[[]]}', r"Not a \$set"),
        ('{"$timedelta":1}', r"Not a \$timedelta"),
    ],
)
def test_text_that_no_dumps_wrote_is_a_value_error(text, said):
    with pytest.raises(ValueError, match=said):
        loads(text)


def test_a_tag_from_a_newer_release_is_an_error_and_not_a_dict():
    with pytest.raises(ValueError, match='newer django_jobs wrote this: it holds "\\$money"'):
        loads('{"price":{"$money":"9.90"}}')


def test_a_value_over_the_size_limit_is_refused_by_its_bytes_and_names_the_setting():
    text = dumps("é" * 100, where=WHERE)
    check_size(text, 202, where=WHERE, setting="MAX_OUTPUT_BYTES")
    with pytest.raises(ValueError, match="over the limit") as caught:
        check_size(text, 201, where=WHERE, setting="MAX_OUTPUT_BYTES")
    for part in (WHERE, "202 bytes", "limit of 201", 'DJANGO_JOBS["MAX_OUTPUT_BYTES"]'):
        assert part in str(caught.value)


def test_importing_payloads_does_not_import_django():
    code = "import sys, django_jobs.payloads; assert 'django' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_uuids_of_any_version_come_back():
    assert roundtrip(uuid.UUID(int=0), where=WHERE) == uuid.UUID(int=0)


def test_dates_and_datetimes_are_not_mixed_up():
    assert same(
        roundtrip([date(2026, 1, 1), datetime(2026, 1, 1)], where=WHERE),
        [date(2026, 1, 1), datetime(2026, 1, 1)],
    )
