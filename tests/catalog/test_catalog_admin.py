"""The catalogue's tables in the admin: plain lists, and a ledger nobody writes by hand."""

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from django_jobs.catalog.factories import BillingAccountFactory, CreditEntryFactory, ProfileFactory
from django_jobs.catalog.models import BillingAccount, DeliveryLog, WebhookEvent

MODELS = ["profile", "billingaccount", "creditentry", "webhookevent", "deliverylog"]


@pytest.fixture
def rows(db):
    ProfileFactory()
    CreditEntryFactory()
    WebhookEvent.objects.create(key="a")
    DeliveryLog.objects.create(dedupe_key="a", run_id="018f0000-0000-7000-8000-000000000000")


@pytest.mark.parametrize("model", MODELS)
def test_a_list_and_its_detail_open(admin_client, rows, model):
    page = admin_client.get(f"/admin/django_jobs_catalog/{model}/")
    assert page.status_code == 200
    [row] = page.context["cl"].result_list
    detail = admin_client.get(f"/admin/django_jobs_catalog/{model}/{row.pk}/change/")
    assert detail.status_code == 200


@pytest.mark.parametrize("model", ["creditentry", "webhookevent", "deliverylog"])
def test_history_cannot_be_written(admin_client, rows, model):
    path = f"/admin/django_jobs_catalog/{model}/"
    [row] = admin_client.get(path).context["cl"].result_list
    for page in (f"{path}add/", f"{path}{row.pk}/change/", f"{path}{row.pk}/delete/"):
        assert admin_client.post(page, {"post": "yes"}).status_code == 403


def test_a_balance_is_not_a_field(admin_client, db):
    account = BillingAccountFactory(credits=7)
    page = f"/admin/django_jobs_catalog/billingaccount/{account.pk}/change/"
    form = {"content_type": account.content_type_id, "object_id": account.object_id, "plan": "pro"}
    assert admin_client.post(page, {**form, "credits": "700"}).status_code == 302
    assert list(BillingAccount.objects.values_list("plan", "credits")) == [("pro", 7)]


@pytest.mark.parametrize(
    ("model", "factory"), [("billingaccount", BillingAccountFactory), ("profile", ProfileFactory)]
)
def test_a_list_costs_the_same_number_of_queries_for_one_row_and_for_thirty(admin_client, db, model, factory):
    def queries():
        with CaptureQueriesContext(connection) as captured:
            assert admin_client.get(f"/admin/django_jobs_catalog/{model}/").status_code == 200
        return len(captured)

    factory()
    queries()
    one = queries()
    factory.create_batch(29)
    assert queries() == one
