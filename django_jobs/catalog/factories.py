"""Rows for a host's tests, by factory-boy. ``BillingAccountFactory(owner=user, plan="pro")``."""

from typing import Any

try:
    import factory
    from factory.django import DjangoModelFactory
except ImportError as error:
    raise ImportError("django_jobs.catalog.factories needs factory-boy: pip install factory-boy") from error

from django.contrib.auth import get_user_model

from .models import BillingAccount, CreditEntry, Profile


class UserFactory(DjangoModelFactory):
    class Meta:
        model = get_user_model()

    username = factory.Sequence(lambda number: f"user-{number}")
    email = factory.LazyAttribute(lambda user: f"{user.username}@example.com")


class ProfileFactory(DjangoModelFactory):
    class Meta:
        model = Profile

    user = factory.SubFactory(UserFactory)
    marketing_opt_in = True


class BillingAccountFactory(DjangoModelFactory):
    class Meta:
        model = BillingAccount

    owner = factory.SubFactory(UserFactory)
    plan = "free"


class CreditEntryFactory(DjangoModelFactory):
    class Meta:
        model = CreditEntry

    account = factory.SubFactory(BillingAccountFactory)
    key = factory.Sequence(lambda number: f"entry:{number}")
    amount = 5
    balance: Any = factory.SelfAttribute("amount")
