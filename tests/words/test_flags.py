"""Flags and the gates made of them."""

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings

from django_jobs import flags
from django_jobs.exceptions import UnknownGate


def given(**tree):
    return override_settings(DJANGO_JOBS={"FLAGS": tree})


@pytest.fixture(autouse=True)
def _nothing_shipped(monkeypatch):
    monkeypatch.setattr(flags, "_defaults", {})


def test_a_flag_is_the_value_at_its_dotted_path():
    with given(payment={"enabled": True, "limit": {"daily": 7}}):
        assert flags.get("payment.enabled") is True
        assert flags.get("payment.limit.daily") == 7
        assert flags.get("payment.limit") == {"daily": 7}


@pytest.mark.parametrize("value", [True, [7, 30], "on", {"x": 1}, 1])
def test_a_gate_on_anything_true_is_open(value):
    with given(a={"b": value}):
        assert flags.closed("a.b") is None


@pytest.mark.parametrize("value", [False, [], "", {}, 0, None])
def test_a_gate_on_anything_empty_is_closed_and_says_which_flag_it_is(value):
    with given(a={"b": value}):
        assert flags.closed("a.b") == "a.b"


def test_a_job_without_a_gate_is_never_kept_out():
    assert flags.closed(None) is None


def test_a_gate_of_several_flags_needs_them_all_and_names_the_first_that_is_off():
    with given(a=True, b=False, c=False):
        assert flags.closed(("a",)) is None
        assert flags.closed(("a", "b", "c")) == "b"


def test_a_gate_may_be_a_function_which_goes_by_its_name():
    def office_is_open():
        return answer

    answer = True
    assert flags.closed(office_is_open) is None
    answer = False
    assert flags.closed(office_is_open) == "office_is_open"


def test_false_for_a_whole_group_switches_off_everything_beneath_it():
    flags.provide({"payment": {"enabled": True}})
    with given(payment=False):
        assert flags.get("payment.enabled") is False


def test_the_host_s_flags_lie_over_those_an_app_ships():
    flags.provide({"email": {"enabled": True, "days": [7]}})
    flags.provide({"email": {"footer": True}})
    with given(email={"enabled": False}):
        assert flags.get("email.enabled") is False
        assert flags.get("email.days") == [7]
        assert flags.get("email.footer") is True


def test_a_flag_nobody_defines_is_an_error_and_not_off():
    with given(payment={"enabled": True}), pytest.raises(UnknownGate, match=r'"payment.enabeld".*'):
        flags.closed("payment.enabeld")
    assert issubclass(UnknownGate, ImproperlyConfigured)


def test_the_error_names_the_nearest_flag_there_is():
    with given(payment={"enabled": True}), pytest.raises(UnknownGate, match=r'mean "payment\.enabled"'):
        flags.get("payment.enable")


def test_without_a_near_one_the_error_guesses_nothing():
    with given(payment=True), pytest.raises(UnknownGate) as raised:
        flags.get("zebra")
    assert "Did you mean" not in str(raised.value)


def test_a_path_that_goes_on_beneath_a_value_is_unknown():
    with given(email={"days": [7]}), pytest.raises(UnknownGate):
        flags.get("email.days.first")


def test_known_lists_the_paths_of_groups_and_values_alike():
    flags.provide({"shipped": {"on": True}})
    with given(own=False):
        assert flags.known() == ["own", "shipped", "shipped.on"]
