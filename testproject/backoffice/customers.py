"""What the pages and the demo do: sign somebody up, sell a plan. Rows and events in one transaction."""

from decimal import Decimal

from django.contrib.auth.models import User
from django.db import transaction
from django.utils import timezone

from django_jobs import emit
from django_jobs.catalog import complete_onboarding
from django_jobs.catalog.models import BillingAccount

from .models import Invoice

PRICES = {"starter": Decimal("9.00"), "pro": Decimal("49.00")}


@transaction.atomic
def sign_up(name: str, email: str, *, wants_mail: bool = True) -> User:
    """Open an account on the free plan. The welcome sequence starts if this commits, and else does not."""
    user = User.objects.create_user(username=email, email=email, first_name=name)
    account = BillingAccount.objects.of(user)
    account.plan, account.plan_started_at = "free", timezone.now()
    account.save()
    complete_onboarding(user, marketing_opt_in=wants_mail)
    return user


@transaction.atomic
def buy_plan(user: User, plan: str) -> Invoice:
    """Move a user to ``plan`` and have the invoice sent. The event commits with both rows."""
    account = BillingAccount.objects.select_for_update().get(pk=BillingAccount.objects.of(user).pk)
    account.plan, account.plan_started_at = plan, timezone.now()
    account.credits_last_granted_at = None  # The new plan's credits are due tonight.
    account.save()
    invoice = Invoice.objects.create(account=account, plan=plan, amount=PRICES[plan])
    emit("plan/bought", {"invoice_id": invoice.pk, "plan": plan}, key=f"invoice:{invoice.pk}")
    return invoice
