"""Stock jobs that tell somebody something."""

from typing import Any

from django_jobs import StepError, job, on

from . import delivery
from .mail import validate


def urgency(event: Any) -> int:
    """Let the mails that somebody waits for overtake a mailing."""
    return -10 if event.data.get("category") == "marketing" else 0


@job("send-email", on("email/send"), group="notifications", retries=3, priority=urgency)
def deliver_email(ctx: Any) -> dict[str, Any]:
    """
    Send one mail. The only place where a mail provider is called.

    A temporary refusal is tried again, a lasting one is not. Marketing mail to somebody who has opted
    out, or is gone, by the time it is sent is dropped.
    """
    mail = ctx.event.data
    ctx.step.run("validate", validate, mail)
    if reason := ctx.step.run("check-recipient", delivery.reason_to_drop, mail):
        return {"sent": 0, "skipped": reason}
    try:
        return ctx.step.run("send", delivery.deliver, mail, ctx.run_id)
    except StepError:
        ctx.step.run("record-failure", delivery.record_failure, mail, ctx.run_id)
        raise
