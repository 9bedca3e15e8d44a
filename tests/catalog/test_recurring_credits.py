"""``recurring-credits``: each plan's credits, once per cycle, whatever happens."""

import logging
from datetime import UTC, date, datetime, time, timedelta

import pytest
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Group
from django.db import connection, transaction
from django.db.models import Sum
from django.test.utils import CaptureQueriesContext

from django_jobs import registry, trigger
from django_jobs.catalog import ports
from django_jobs.catalog.accounts import CatalogBilling
from django_jobs.catalog.factories import BillingAccountFactory, UserFactory
from django_jobs.catalog.models import BillingAccount, CreditEntry, WebhookEvent
from django_jobs.models import Run
from django_jobs.testing import now


def day(number, hour=0):
    """An instant ``number`` days after the first of January 2030."""
    return datetime(2030, 1, 1, hour, tzinfo=UTC) + timedelta(days=number)


@pytest.fixture
def nights(jobs):
    """Begin on the evening before 1 January 2030; then let midnights pass: ``nights(1)``."""
    jobs.travel_to(day(-1, 22))

    def pass_by(count):
        jobs.advance(timedelta(days=count))
        return list(credit_runs())

    return pass_by


def credit_runs():
    return Run.objects.filter(job_id="recurring-credits").order_by("scheduled_for")


def balance(account):
    account.refresh_from_db()
    assert account.credits == (account.entries.aggregate(sum=Sum("amount"))["sum"] or 0), "the ledger adds up"
    return account.credits


def test_the_job_is_declared_as_the_catalogue_says():
    job = registry.get("recurring-credits")
    assert (job.group, job.gate, job.retries) == ("billing", "pricing.credits.enabled", 2)
    assert [str(trigger) for trigger in job.triggers] == ['cron("0 0 * * *")']


def test_each_plan_gets_its_credits_at_midnight_utc(nights):
    accounts = {plan: BillingAccountFactory(plan=plan) for plan in ("free", "starter", "pro")}
    [run] = nights(1)

    assert {plan: balance(account) for plan, account in accounts.items()} == {
        "free": 5,
        "starter": 10,
        "pro": 50,
    }
    assert run.output == {"date": date(2030, 1, 1), "granted": 3, "credits": 65, "skipped": 0}
    assert (run.scheduled_for, run.status) == (day(0), "completed")


def test_the_steps_have_the_names_of_the_catalogue(nights):
    account = BillingAccountFactory()
    [run] = nights(1)
    names = list(run.steps.order_by("pk").values_list("name", "kind"))
    assert names == [("find-eligible-entities", "run"), (f"grant-credits-{account.pk}", "atomic")]


def test_credits_come_again_on_the_interval_and_add_up(nights):
    account = BillingAccountFactory(plan="pro")
    nights(1)
    nights(29)
    assert balance(account) == 50
    nights(1)
    assert balance(account) == 100
    nights(30)
    assert balance(account) == 150


def test_the_ledger_says_why(nights):
    account = BillingAccountFactory(plan="pro")
    nights(31)
    entries = list(account.entries.values_list("key", "amount", "balance", "reason"))
    assert entries == [
        (f"recurring-credits:{account.pk}:2030-01-01", 50, 50, "plan pro"),
        (f"recurring-credits:{account.pk}:2030-01-31", 50, 100, "plan pro"),
    ]
    assert set(WebhookEvent.objects.values_list("key", flat=True)) == {entry[0] for entry in entries}


def test_a_ledger_row_is_never_rewritten(nights):
    BillingAccountFactory()
    nights(1)
    entry = CreditEntry.objects.get()
    entry.amount = 5000
    with pytest.raises(TypeError, match="only ever added"):
        entry.save()


# Due.


@pytest.mark.parametrize(
    ("last", "is_due"),
    [
        (day(-30), True),
        (day(-30) + timedelta(seconds=5), True),
        (day(-30, 23), True),
        (day(-29), False),
        (day(-31, 23), True),
        (day(-1), False),
        (day(40), False),
    ],
)
def test_dates_are_compared_and_not_instants(nights, last, is_due):
    account = BillingAccountFactory(credits_last_granted_at=last)
    nights(1)
    assert balance(account) == (5 if is_due else 0)


def test_the_cycle_does_not_creep(nights):
    account = BillingAccountFactory(credits_last_granted_at=day(-30) + timedelta(seconds=5))
    nights(31 + 30 * 5)
    account.refresh_from_db()
    assert account.credits_last_granted_at == day(180) + timedelta(seconds=5)
    assert account.entries.count() == 7


def test_a_first_grant_is_due_now_and_anchored_on_the_start_of_the_plan(nights):
    account = BillingAccountFactory(plan_started_at=day(-40, 9))
    nights(1)
    assert balance(account) == 5
    assert account.credits_last_granted_at == day(-10, 9)
    nights(19)
    assert balance(account) == 5
    nights(1)
    assert balance(account) == 10


def test_five_nights_of_downtime_make_one_grant_and_leave_the_next_due_date(nights):
    account = BillingAccountFactory(credits_last_granted_at=day(-5))
    at = day(30)  # Due since day 25.
    with transaction.atomic():
        assert CatalogBilling().grant(str(account.pk), at) == {"credits": 5}
    assert balance(account) == 5
    assert account.credits_last_granted_at == day(25)


def test_missed_cycles_are_granted_once(nights):
    account = BillingAccountFactory(credits_last_granted_at=day(-100))
    nights(1)
    assert balance(account) == 5
    assert account.credits_last_granted_at == day(-10)  # By whole intervals: 3 x 30 days.


def test_missed_cycles_are_granted_all_when_told_so(nights, catalog):
    catalog(pricing={"credits": {"catch_up": "all"}})
    account = BillingAccountFactory(plan="pro", credits_last_granted_at=day(-100))
    new = BillingAccountFactory(plan="pro", plan_started_at=day(-100))
    nights(1)
    assert (balance(account), account.entries.count()) == (150, 1)
    assert balance(new) == 50, "nobody's first grant makes up for the past"


def test_thirty_days_from_the_end_of_january_is_in_march(nights):
    account = BillingAccountFactory()
    account.credits_last_granted_at = datetime(2030, 1, 31, tzinfo=UTC)
    account.save()
    nights(61)
    account.refresh_from_db()
    assert account.credits_last_granted_at == datetime(2030, 3, 2, tzinfo=UTC)


def test_calendar_months_keep_to_the_day_they_began_on(nights, catalog):
    catalog(pricing={"plans": {"free": {"credits": 1, "credit_interval": "month"}}})
    account = BillingAccountFactory(plan_started_at=datetime(2029, 12, 31, 12, tzinfo=UTC))
    nights(121)

    dates = [key.rpartition(":")[2] for key in account.entries.values_list("key", flat=True)]
    # The job first ran on 1 January; from then on at each end of the month.
    assert dates == ["2030-01-01", "2030-01-31", "2030-02-28", "2030-03-31", "2030-04-30"]


# Who gets none.


@pytest.mark.parametrize(
    "account",
    [
        {"plan_expires_at": day(0)},
        {"plan_expires_at": day(-3)},
        {"plan": ""},
        {"plan": "unheard-of"},
        {"is_active": False},
        {"owner__is_active": False},
    ],
    ids=str,
)
def test_no_credits(nights, account):
    account = BillingAccountFactory(**account)
    nights(1)
    assert balance(account) == 0
    assert not WebhookEvent.objects.exists(), "and the claim of the day is not spent"


def test_a_plan_that_lapses_tomorrow_still_gives(nights):
    account = BillingAccountFactory(plan_expires_at=day(1))
    nights(1)
    assert balance(account) == 5


def test_an_owner_who_is_gone_gets_none_and_the_account_stays(nights):
    user = UserFactory()
    account = BillingAccountFactory(owner=user)
    user.delete()
    nights(1)
    assert balance(account) == 0


def test_plans_without_credits_or_interval_give_none(nights, catalog):
    catalog(
        pricing={
            "plans": {
                "none": {},
                "once": {"credits": 100},
                "nothing": {"credits": 0, "credit_interval": 30},
            }
        }
    )
    accounts = [BillingAccountFactory(plan=plan) for plan in ("none", "once", "nothing")]
    nights(1)
    assert [balance(account) for account in accounts] == [0, 0, 0]


def test_an_unknown_plan_is_skipped_with_a_warning(nights, caplog):
    BillingAccountFactory(plan="gold")
    with caplog.at_level(logging.WARNING, logger="django_jobs.catalog"):
        [run] = nights(1)
    assert run.status == "completed"
    assert "gold" in caplog.text


@pytest.mark.parametrize(("on_trial", "credits"), [(None, 5), (True, 5), (False, 0)])
def test_a_trial_gets_credits_unless_its_plan_says_no(nights, catalog, on_trial, credits):
    plan = {"credits": 5, "credit_interval": 30}
    if on_trial is not None:
        plan["grant_credits_on_trial"] = on_trial
    catalog(pricing={"plans": {"free": plan}})
    account = BillingAccountFactory(trial_ends_at=day(10))
    nights(1)
    assert balance(account) == credits
    nights(10)
    assert balance(account) == 5


def test_the_grant_reads_the_plan_again(jobs):
    account = BillingAccountFactory(plan="free")
    page = ports.billing().due_page(now(), after="", limit=10)
    BillingAccount.objects.update(plan="pro")
    [entity] = page["entities"]
    assert ports.billing().grant(entity, now()) == {"credits": 50}
    assert balance(account) == 50


@pytest.mark.parametrize(
    "plan", [{"credits": -1}, {"credits": "5"}, {"credit_interval": "week"}, {"credits": 1.5}]
)
def test_a_plan_that_makes_no_sense_fails_the_run_and_names_it(nights, catalog, plan):
    catalog(pricing={"plans": {"odd": plan}})
    account = BillingAccountFactory()
    [run] = nights(1)
    assert run.status == "failed"
    assert '"odd"' in run.error["message"]
    assert balance(account) == 0


# Once.


def test_the_same_night_twice_is_one_grant(nights):
    account = BillingAccountFactory()
    nights(1)
    trigger("recurring-credits")
    nights(0)
    assert balance(account) == 5


def test_a_stamp_that_was_lost_is_no_second_grant_on_the_same_day(nights):
    account = BillingAccountFactory()
    nights(1)
    BillingAccount.objects.update(credits_last_granted_at=None)
    run = trigger("recurring-credits")
    nights(0)
    run.refresh_from_db()
    assert (run.output["granted"], run.output["skipped"]) == (0, 1)
    assert balance(account) == 5


def test_a_retry_that_slips_past_midnight_is_still_for_its_own_date(jobs):
    account = BillingAccountFactory()
    jobs._now = day(1, 0)
    run = jobs.run("recurring-credits", {"at": day(0, 23)})
    assert run.output["date"] == date(2030, 1, 1)
    assert account.entries.get().key.endswith("2030-01-01")


def test_a_crash_at_any_moment_grants_once(jobs):
    accounts = []

    def next_account():
        accounts.append(BillingAccountFactory(plan="pro"))

    count = 0
    for run in jobs.crash_everywhere("recurring-credits", next_account):
        assert run.status == "completed"
        count += 1
    assert count > 4
    assert {balance(account) for account in accounts} == {50}
    assert {account.entries.count() for account in accounts} == {1}


@pytest.mark.django_db(transaction=True)
def test_two_workers_at_once_grant_once(at_once):
    entity = str(BillingAccountFactory(plan="pro").pk)

    def grant():
        with transaction.atomic():
            return CatalogBilling().grant(entity, day(0))

    outcomes = at_once(grant)

    assert sorted(outcome.get("skipped", "") for outcome in outcomes) == ["", "not-due", "not-due", "not-due"]
    assert balance(BillingAccount.objects.get()) == 50


def test_a_run_older_than_the_claims_are_kept_grants_nothing(jobs, caplog):
    account = BillingAccountFactory()
    with caplog.at_level(logging.WARNING, logger="django_jobs.catalog"):
        run = jobs.run("recurring-credits", {"at": now() - timedelta(days=31)})
    assert run.output["skipped"] == "too-old"
    assert "too old" in caplog.text
    assert balance(account) == 0


# Many, and some that fail.


def test_more_than_a_page_is_found_page_by_page_in_a_fixed_order(nights, catalog):
    catalog(pricing={"credits": {"page_size": 2}})
    accounts = [BillingAccountFactory() for _ in range(5)]
    [run] = nights(1)

    assert [balance(account) for account in accounts] == [5] * 5
    pages = run.steps.filter(name__startswith="find").order_by("pk").values_list("name", flat=True)
    assert list(pages) == ["find-eligible-entities", "find-eligible-entities-1", "find-eligible-entities-2"]


def test_more_than_a_run_may_hold_goes_on_in_another(nights, catalog):
    catalog(pricing={"credits": {"page_size": 2, "pages_per_run": 2}})
    accounts = [BillingAccountFactory() for _ in range(9)]
    runs = nights(1)

    assert [balance(account) for account in accounts] == [5] * 9
    assert sorted(run.output["granted"] for run in runs) == [1, 4, 4]
    assert {run.output["date"] for run in runs} == {date(2030, 1, 1)}


class OneIsBroken(CatalogBilling):
    broken = ""

    def grant(self, entity, at):
        if entity == self.broken:
            raise RuntimeError("the row is cursed")
        return super().grant(entity, at)


def test_one_account_that_fails_stops_no_other_and_the_run_says_which(nights, catalog):
    catalog(PORTS={"billing": f"{__name__}.OneIsBroken"})
    accounts = [BillingAccountFactory() for _ in range(3)]
    OneIsBroken.broken = str(accounts[1].pk)
    [run] = nights(1)

    assert [balance(account) for account in accounts] == [5, 0, 5]
    assert run.status == "failed"
    assert f"Failed: {accounts[1].pk}" in run.error["message"]
    assert run.steps.get(name=f"grant-credits-{accounts[1].pk}").attempts == 3

    OneIsBroken.broken = ""
    nights(1)
    assert balance(accounts[1]) == 5, "the next night picks it up"


class SwitchesOff(CatalogBilling):
    switch = None

    def grant(self, entity, at):
        outcome = super().grant(entity, at)
        self.switch()
        return outcome


def test_a_flag_switched_off_stops_before_the_next_account(jobs, flag, catalog):
    accounts = [BillingAccountFactory() for _ in range(3)]
    SwitchesOff.switch = staticmethod(lambda: flag(pricing={"credits": {"enabled": False}}))
    catalog(PORTS={"billing": f"{__name__}.SwitchesOff"})
    run = jobs.run("recurring-credits")

    assert run.status == "completed"
    assert (run.output["stopped"], run.output["flag"]) == ("disabled", "pricing.credits.enabled")
    assert [balance(account) for account in accounts] == [5, 0, 0]


def test_with_the_flag_off_the_job_is_not_registered_and_balances_stay(nights, flag):
    account = BillingAccountFactory(credits=7)
    flag(pricing={"credits": {"enabled": False}})
    assert nights(3) == []
    account.refresh_from_db()
    assert account.credits == 7
    assert "recurring-credits" not in [job.id for job in registry.jobs()]


def test_a_page_costs_the_same_number_of_queries_for_one_account_and_for_thirty(jobs):
    def queries():
        with CaptureQueriesContext(connection) as captured:
            ports.billing().due_page(now(), after="", limit=100)
        return len(captured)

    BillingAccountFactory()
    one = queries()
    for _ in range(29):
        BillingAccountFactory()
    assert queries() == one


def test_the_owner_may_be_any_model(nights):
    group = Group.objects.create(name="ACME")
    account = BillingAccount.objects.of(group)
    assert BillingAccount.objects.of(group) == account
    BillingAccount.objects.update(plan="starter")
    nights(1)
    assert balance(account) == 10
    assert get_user_model().objects.count() == 0


def test_the_run_date_is_the_scheduled_one_at_midnight_utc_everywhere(nights, settings):
    settings.TIME_ZONE = "Pacific/Auckland"
    BillingAccountFactory()
    [run] = nights(1)
    assert run.scheduled_for.astimezone(UTC).time() == time(0, 0)
    assert run.output["date"] == date(2030, 1, 1)
