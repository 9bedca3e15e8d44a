from django.db import models
from django.utils import timezone

from django_jobs.catalog.models import BillingAccount


class Invoice(models.Model):
    """What an account owes for a plan. It gets its number when it is sent, so that none is missing."""

    account = models.ForeignKey(BillingAccount, models.PROTECT, related_name="invoices")
    plan = models.CharField(max_length=50)
    amount = models.DecimalField(max_digits=8, decimal_places=2)
    number = models.PositiveIntegerField(null=True, blank=True, unique=True)
    #: What the accounting service called it.
    booking = models.CharField(max_length=50, blank=True)
    created_at = models.DateTimeField(default=timezone.now)

    def __str__(self) -> str:
        return f"Invoice {self.number or '(draft)'}"
