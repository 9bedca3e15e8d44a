"""``user-onboarding``: two weeks of mails, in milliseconds."""

import logging
from datetime import timedelta

import pytest
from django.db import transaction

from django_jobs import emit, registry
from django_jobs.catalog import complete_onboarding, ports
from django_jobs.catalog.adapters import DjangoUsers
from django_jobs.catalog.factories import ProfileFactory, UserFactory
from django_jobs.catalog.models import Profile
from django_jobs.models import Event, Run
from django_jobs.testing import now

DAY = timedelta(days=1)
ALL = ["Welcome, Ada", "First steps", "Three tips", "How is it going?"]


@pytest.fixture
def ada():
    """A new user who wants to hear from us."""
    return ProfileFactory(user__first_name="Ada", user__email="ada@example.com", marketing_opt_in=True).user


@pytest.fixture
def run(jobs):
    """Return the only onboarding run, as it is now."""
    return lambda: Run.objects.get(job_id="user-onboarding")


def complete(user_id, **data):
    return emit("user/onboarding.completed", {"user_id": user_id, **data})


def subjects(mailoutbox):
    return [mail.subject for mail in mailoutbox]


def test_the_job_is_declared_as_the_catalogue_says():
    job = registry.get("user-onboarding")
    assert (job.group, job.gate, job.retries) == ("lifecycle", None, 3)
    assert [str(trigger) for trigger in job.triggers] == ['on("user/onboarding.completed")']


def test_four_mails_come_on_days_0_2_7_and_14(jobs, ada, mailoutbox, run):
    complete(ada.pk)
    sent = []
    for _ in range(16):
        jobs.drain()
        sent.append(len(mailoutbox))
        jobs.advance(DAY)

    assert sent == [1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 4, 4]
    assert subjects(mailoutbox) == ALL
    assert (run().status, run().output, run().passes) == ("completed", {"sent": 4}, 4)


def test_the_steps_have_the_names_of_the_catalogue(jobs, ada, run):
    complete(ada.pk)
    jobs.advance(14 * DAY)
    assert list(run().steps.order_by("pk").values_list("name", flat=True)) == [
        "claim",
        "plan",
        *["wait-day-0", "load-user-0", "send-welcome"],
        *["wait-day-2", "load-user-2", "send-getting-started"],
        *["wait-day-7", "load-user-7", "send-tips"],
        *["wait-day-14", "load-user-14", "send-check-in"],
    ]


def test_no_address_and_no_name_stays_in_the_steps(jobs, ada, run):
    complete(ada.pk)
    jobs.advance(14 * DAY)
    kept = str([step.output for step in run().steps.all()]) + str(run().output)
    assert "ada" not in kept.lower()


def test_the_mails_are_events_with_a_dedupe_key_each(jobs, ada):
    complete(ada.pk)
    jobs.advance(14 * DAY)
    mails = [event.data for event in jobs.emitted("email/send")]
    names = ("welcome", "getting-started", "tips", "check-in")
    assert [mail["dedupe_key"] for mail in mails] == [f"onboarding:{ada.pk}:{name}" for name in names]
    assert [mail["category"] for mail in mails] == ["transactional", "marketing", "marketing", "marketing"]
    assert {mail["user_id"] for mail in mails} == {ada.pk}
    assert all(mail["html"].startswith("<!doctype html>") and mail["text"] for mail in mails)


def test_a_run_asleep_holds_nothing(jobs, ada, run):
    complete(ada.pk)
    jobs.drain()
    asleep = run()
    assert (asleep.status, asleep.lease) == ("sleeping", None)
    assert asleep.wake_at == asleep.event.occurred_at + 2 * DAY


def test_the_days_are_counted_from_completion_and_not_from_the_mail_before(jobs, ada, run):
    completed_at = now() - timedelta(minutes=50)  # The run starts that much later.
    complete(ada.pk, completed_at=completed_at)
    jobs.advance(14 * DAY)
    plan = run().steps.get(name="plan").output
    assert [due - completed_at for _, _, due in plan] == [0 * DAY, 2 * DAY, 7 * DAY, 14 * DAY]
    assert run().finished_at == completed_at + 14 * DAY


# Once.


def test_a_second_event_starts_nothing(jobs, ada, mailoutbox):
    complete(ada.pk)
    jobs.drain()
    second = complete(ada.pk).runs.get()
    jobs.advance(15 * DAY)

    second.refresh_from_db()
    assert second.output == {"sent": 0, "skipped": "already-started"}
    assert subjects(mailoutbox) == ALL


def test_two_users_do_not_share_a_claim(jobs, mailoutbox):
    for _ in range(2):
        complete(ProfileFactory().user_id)
    jobs.drain()
    assert len(mailoutbox) == 2


def test_a_worker_restarted_on_day_three_repeats_nothing(jobs, ada, mailoutbox, run):
    complete(ada.pk)
    jobs.advance(3 * DAY)
    before = run()
    jobs.advance(12 * DAY)
    assert run().passes > before.passes
    assert subjects(mailoutbox) == ALL


def test_a_crash_at_any_moment_sends_each_mail_once(jobs, mailoutbox, catalog):
    catalog(email={"onboarding_schedule": [(0, "welcome"), (2, "tips")]})
    users = []

    def next_user():
        users.append(ProfileFactory().user)
        return {"user_id": users[-1].pk}

    count = 0
    for run in jobs.crash_everywhere("user-onboarding", next_user):
        assert (run.status, run.output) == ("completed", {"sent": 2})
        count += 1

    assert count > 10
    sent = sorted((mail.to[0], mail.subject) for mail in mailoutbox)
    wanted = [
        (user.email, subject) for user in users for subject in (f"Welcome, {user.username}", "Three tips")
    ]
    assert sent == sorted(wanted)
    assert len(jobs.emitted("email/send")) == 2 * len(users), "and each event, exactly"


# Who gets what.


def test_somebody_deleted_on_day_five_got_two_mails_and_no_more(jobs, ada, mailoutbox, run):
    complete(ada.pk)
    jobs.advance(5 * DAY)
    ada.delete()
    jobs.advance(20 * DAY)
    assert subjects(mailoutbox) == ALL[:2]
    assert run().output == {"sent": 2, "ended": "user-deleted"}


def test_somebody_banned_on_day_five_got_two_mails_and_no_more(jobs, ada, mailoutbox, run):
    complete(ada.pk)
    jobs.advance(5 * DAY)
    ada.is_active = False
    ada.save()
    jobs.advance(20 * DAY)
    assert len(mailoutbox) == 2
    assert (run().status, run().output) == ("completed", {"sent": 2, "ended": "user-inactive"})


def test_somebody_who_opts_out_on_day_six_got_two_mails_and_the_run_completes(jobs, ada, mailoutbox, run):
    complete(ada.pk)
    jobs.advance(6 * DAY)
    Profile.objects.update(marketing_opt_in=False)
    jobs.advance(20 * DAY)
    assert subjects(mailoutbox) == ALL[:2]
    assert run().status == "completed"
    assert run().output == {"sent": 2, "skipped": {"tips": "not-opted-in", "check-in": "not-opted-in"}}


def test_somebody_who_opts_in_later_gets_the_mails_from_then_on(jobs, ada, mailoutbox):
    Profile.objects.update(marketing_opt_in=False)
    complete(ada.pk)
    jobs.advance(6 * DAY)
    assert subjects(mailoutbox) == ALL[:1]
    Profile.objects.update(marketing_opt_in=True)
    jobs.advance(20 * DAY)
    assert subjects(mailoutbox) == [ALL[0], *ALL[2:]]


def test_somebody_who_was_never_asked_gets_the_welcome_alone(jobs, mailoutbox):
    complete(UserFactory(first_name="Ada").pk)
    jobs.advance(20 * DAY)
    assert subjects(mailoutbox) == ["Welcome, Ada"]


def test_without_an_address_it_ends(jobs, mailoutbox, run):
    complete(ProfileFactory(user__email="").user_id)
    jobs.drain()
    assert (run().output, mailoutbox) == ({"sent": 0, "ended": "no-email"}, [])


def test_an_address_not_yet_verified_is_left_out_until_it_is(jobs, ada, mailoutbox, run):
    Profile.objects.update(email_verified=False)
    complete(ada.pk)
    jobs.advance(DAY)
    Profile.objects.update(email_verified=True)
    jobs.advance(20 * DAY)
    assert subjects(mailoutbox) == ALL[1:]
    assert run().output == {"sent": 3, "skipped": {"welcome": "unverified"}}


def test_a_new_address_is_used_from_then_on(jobs, ada, mailoutbox):
    complete(ada.pk, email="ada@example.com")
    jobs.advance(DAY)
    ada.email = "lovelace@example.com"
    ada.save()
    jobs.advance(20 * DAY)
    assert [mail.to for mail in mailoutbox] == [["ada@example.com"], *[["lovelace@example.com"]] * 3]


def test_the_mails_are_in_the_users_language(jobs, ada, mailoutbox, tmp_path, settings):
    (tmp_path / "django_jobs_catalog/onboarding/welcome").mkdir(parents=True)
    subject = tmp_path / "django_jobs_catalog/onboarding/welcome/subject.txt"
    subject.write_text("{% load i18n %}{% translate 'Monday' %}")
    settings.TEMPLATES = [{**settings.TEMPLATES[0], "DIRS": [str(tmp_path)]}]
    complete(ada.pk, locale="de")
    jobs.drain()
    Profile.objects.update(locale="fr")
    complete(ProfileFactory(locale="fr").user_id, locale="de")
    jobs.drain()
    assert subjects(mailoutbox) == ["Montag", "lundi"]


# Late.


@pytest.mark.parametrize(
    ("late", "expected"),
    [
        (timedelta(minutes=59), ALL),
        (DAY, ALL),
        (2.5 * DAY, [ALL[0], *ALL[2:]]),
        (3.5 * DAY, ALL[2:]),
        (10 * DAY, ALL[3:]),
        (400 * DAY, []),
    ],
    ids=str,
)
def test_a_late_event_sends_what_is_still_to_come_and_never_all_at_once(
    jobs, ada, mailoutbox, late, expected
):
    complete(ada.pk, completed_at=now() - late)
    jobs.drain()
    assert len(mailoutbox) <= 1
    jobs.advance(20 * DAY)
    assert subjects(mailoutbox) == expected


def test_a_time_given_as_text_is_understood(jobs, ada, mailoutbox):
    complete(ada.pk, completed_at=(now() - 10 * DAY).isoformat())
    jobs.advance(20 * DAY)
    assert subjects(mailoutbox) == ALL[3:]


@pytest.mark.parametrize(
    "data", [{}, {"user_id": None}, {"user_id": 7, "completed_at": "yesterday"}], ids=str
)
def test_an_event_that_makes_no_sense_fails_at_once(jobs, data):
    run = emit("user/onboarding.completed", data).runs.get()
    jobs.advance(DAY)
    run.refresh_from_db()
    assert (run.status, run.attempts.count()) == ("failed", 1)


# The schedule.


def test_an_empty_schedule_sends_nothing_and_takes_no_claim(jobs, ada, mailoutbox, catalog, run):
    catalog(email={"onboarding_schedule": []})
    complete(ada.pk)
    jobs.drain()
    assert run().output == {"sent": 0, "skipped": "no-schedule"}
    assert ports.claim(f"onboarding:{ada.pk}")


def test_a_schedule_edited_meanwhile_does_not_touch_runs_under_way(jobs, ada, mailoutbox, catalog):
    complete(ada.pk)
    jobs.advance(DAY)
    catalog(email={"onboarding_schedule": [(3, "tips")]})
    jobs.advance(20 * DAY)
    assert subjects(mailoutbox) == ALL


def test_a_template_that_is_gone_is_left_out_with_a_warning(jobs, ada, mailoutbox, catalog, run, caplog):
    catalog(email={"onboarding_schedule": [(0, "welcome"), (1, "removed"), (2, "tips")]})
    complete(ada.pk)
    with caplog.at_level(logging.WARNING):
        jobs.advance(20 * DAY)
    assert subjects(mailoutbox) == [ALL[0], ALL[2]]
    assert run().output == {"sent": 2, "skipped": {"removed": "no-template"}}
    assert "removed" in caplog.text


def test_the_length_of_a_day_can_be_set(jobs, ada, mailoutbox, catalog):
    catalog(DAY=timedelta(seconds=0.4))
    complete(ada.pk)
    jobs.advance(timedelta(seconds=14 * 0.4))
    assert subjects(mailoutbox) == ALL


class ForgetsOnce(DjangoUsers):
    """Fails for good while the second mail is prepared."""

    broken = False

    def contact(self, user_id):
        if self.broken:
            raise ConnectionError("the directory is away")
        return super().contact(user_id)


def test_one_mail_that_fails_does_not_end_the_sequence(jobs, ada, mailoutbox, catalog, run):
    catalog(PORTS={"users": f"{__name__}.ForgetsOnce"})
    complete(ada.pk)
    jobs.advance(DAY)
    directory = ports.users()
    directory.broken = True
    jobs.advance(2 * DAY)
    directory.broken = False
    jobs.advance(20 * DAY)

    assert subjects(mailoutbox) == [ALL[0], *ALL[2:]]
    assert run().output == {"sent": 3, "skipped": {"getting-started": "failed"}}
    assert run().steps.get(name="load-user-2").attempts == 4


# The helper.


def test_completing_notes_it_and_starts_the_sequence(jobs, mailoutbox):
    user = UserFactory(first_name="Ada")
    event_id = complete_onboarding(user, marketing_opt_in=True, locale="en")

    profile = Profile.objects.get(user=user)
    assert (profile.marketing_opt_in, profile.locale) == (True, "en")
    assert profile.onboarding_completed_at
    assert Event.objects.get(pk=event_id).data == {"user_id": user.pk, "locale": "en"}
    jobs.advance(14 * DAY)
    assert subjects(mailoutbox) == ALL


def test_completing_twice_changes_nothing(jobs):
    user = UserFactory()
    complete_onboarding(user, marketing_opt_in=True)
    before = Profile.objects.values().get()

    assert complete_onboarding(user, marketing_opt_in=False) is None
    assert Profile.objects.values().get() == before
    assert Event.objects.count() == 1


def test_no_answer_leaves_what_the_profile_says(jobs, ada):
    Profile.objects.update(onboarding_completed_at=None)
    complete_onboarding(ada)
    assert Profile.objects.get().marketing_opt_in is True


def test_a_sign_up_that_is_rolled_back_starts_nothing(jobs):
    user = UserFactory()
    with pytest.raises(RuntimeError), transaction.atomic():
        complete_onboarding(user)
        raise RuntimeError
    assert not Event.objects.exists()
    assert not Profile.objects.exists()
    assert complete_onboarding(user)


@pytest.mark.django_db(transaction=True)
def test_of_several_requests_at_once_one_starts_the_sequence(at_once):
    user = UserFactory()
    answers = at_once(lambda: complete_onboarding(user))
    assert sorted(answer is None for answer in answers) == [False, True, True, True]
    assert Event.objects.count() == 1
