"""Options, ports and the little that is shared: what a host may say, and what it hears when it errs."""

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import transaction

import django_jobs.catalog
from django_jobs import flags
from django_jobs.catalog import apps, claim, factories, options, ports
from django_jobs.catalog.models import WebhookEvent

ready_made = factories.UserFactory  # Anything that is no adapter.


class Tells:
    def contact(self, user_id):
        return ports.Contact(user_id, email="host@example.com")

    def complete_onboarding(self, user_id, *, marketing_opt_in, locale):
        return False


tells = Tells()


@pytest.mark.parametrize("path", ["Tells", "tells"])
def test_a_host_puts_its_own_adapter_in_place(catalog, path):
    catalog(PORTS={"users": f"{__name__}.{path}"})
    assert ports.users().contact(7).email == "host@example.com"


def test_an_adapter_is_made_once_and_again_after_the_settings_change(catalog):
    first = ports.users()
    assert ports.users() is first
    catalog()
    assert ports.users() is not first


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere.Adapter", "nowhere"),
        ("tests.catalog.test_ports.missing", "missing"),
        ("builtins.object", "is no UserDirectory; that has: contact, complete_onboarding"),
    ],
)
def test_what_is_no_adapter_is_refused_by_name(catalog, path, words):
    catalog(PORTS={"users": path})
    with pytest.raises(ImproperlyConfigured, match=words) as error:
        ports.users()
    assert '["PORTS"]["users"]' in str(error.value)


def test_a_port_has_at_most_six_methods():
    for protocol, _ in ports._ADAPTERS.values():
        assert len([name for name in vars(protocol) if not name.startswith("_")]) <= 6


def test_what_the_host_gives_for_an_option_replaces_it_whole_and_leaves_the_rest(catalog):
    catalog(pricing={"plans": {"gold": {"credits": 7, "credit_interval": 1}}})
    assert options.plans() == {"gold": options.Plan(7, 1)}
    assert options.option("pricing.credits.catch_up") == "once"
    assert options.option("email.onboarding_schedule")[3] == (14, "check-in")


def test_the_shipped_plans():
    assert options.plans() == {
        "free": options.Plan(5, 30),
        "starter": options.Plan(10, 30),
        "pro": options.Plan(50, 30),
    }


def test_every_shipped_flag_is_on(overrides):
    overrides(FLAGS={})
    assert flags.get("email.inactive_email_schedule") == [7, 30, 90]
    for path in apps.FLAGS:
        if path not in ("email", "pricing"):
            assert flags.get(f"{path}.enabled") is True
    assert flags.get("pricing.credits.enabled") is True


def test_the_helpers_are_where_a_host_looks_for_them():
    for name in django_jobs.catalog.__all__:
        assert callable(getattr(django_jobs.catalog, name))
        assert name in dir(django_jobs.catalog)
    with pytest.raises(AttributeError, match="send_pigeon"):
        django_jobs.catalog.send_pigeon  # noqa: B018


@pytest.mark.django_db
def test_a_key_is_claimed_once():
    assert [claim("a"), claim("a"), claim("b"), claim("A")] == [True, False, True, True]
    assert WebhookEvent.objects.filter(status="processed").count() == 3


@pytest.mark.django_db
def test_a_claim_that_is_rolled_back_was_none():
    with pytest.raises(RuntimeError), transaction.atomic():
        assert claim("a")
        raise RuntimeError
    assert claim("a")


@pytest.mark.django_db(transaction=True)
def test_of_several_claims_at_once_one_wins(at_once):
    assert sorted(at_once(lambda: claim("a"))) == [False, False, False, True]
