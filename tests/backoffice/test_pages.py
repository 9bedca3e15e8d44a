"""The pages: what a visitor sees and does."""

import pytest
from django.contrib.auth.models import User

from django_jobs.models import Event, Run
from testproject.backoffice.customers import sign_up
from testproject.backoffice.models import Invoice

NEW = {"new-name": "Ada", "new-email": "ada@example.com", "new-wants_mail": "on"}


@pytest.mark.django_db
def test_the_empty_site_says_what_to_do(client):
    page = client.get("/").content.decode()
    assert "Nothing has run yet" in page
    assert "Nobody has signed up yet" in page
    assert "/admin/" in page


@pytest.mark.django_db
def test_every_job_is_on_the_page_with_what_starts_it(client):
    page = client.get("/").content.decode()
    for words in (
        "send-invoice",
        "on(&quot;plan/bought&quot;)",
        "Number an invoice, book it and mail it.",
        "recurring-credits",
    ):
        assert words in page


def test_signing_up_starts_the_welcome_sequence(jobs, client, mailoutbox):
    page = client.post("/sign-up/", NEW, follow=True)
    assert "Ada is signed up" in page.content.decode()
    assert Event.objects.get().name == "user/onboarding.completed"

    jobs.drain()
    assert [mail.subject for mail in mailoutbox] == ["Welcome, Ada"]
    assert "user-onboarding" in client.get("/").content.decode()


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "This field is required"),
        ({**NEW, "new-email": "nowhere"}, "valid email"),
        ({**NEW, "new-email": "there@example.com"}, "signed up already"),
    ],
)
def test_a_wrong_entry_is_shown_where_it_is_and_starts_nothing(client, data, words):
    User.objects.create_user("there@example.com")
    page = client.post("/sign-up/", data)
    assert page.status_code == 422
    assert words in page.content.decode()
    assert not Event.objects.exists()


def test_buying_a_plan_starts_the_invoice(jobs, client):
    sign_up("Ada", "ada@example.com")
    page = client.post("/buy/", {"sale-customer": "ada@example.com", "sale-plan": "pro"}, follow=True)
    assert "Ada has bought pro" in page.content.decode()
    assert Invoice.objects.get().plan == "pro"
    assert Run.objects.filter(job_id="send-invoice").count() == 1


@pytest.mark.django_db
@pytest.mark.parametrize("data", [{}, {"sale-customer": "nobody", "sale-plan": "pro"}])
def test_a_sale_to_nobody_is_refused(client, data):
    assert client.post("/buy/", data).status_code == 422
    assert not Invoice.objects.exists()


@pytest.mark.django_db
@pytest.mark.parametrize("path", ["/sign-up/", "/buy/"])
def test_looking_changes_nothing(client, path):
    assert client.get(path).status_code == 405


@pytest.mark.django_db
def test_the_page_shows_what_people_call_themselves_and_runs_none_of_it(client):
    sign_up("<script>alert(1)</script>", "ada@example.com")
    assert "<script>" not in client.get("/").content.decode()
