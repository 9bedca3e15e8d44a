"""A try that failed, kept with its traceback. Rows are only ever added."""

from django.db import models
from django.utils.translation import gettext_lazy as _

from .run import Run
from .step import Step


class Attempt(models.Model):
    run = models.ForeignKey(Run, models.CASCADE, related_name="attempts", verbose_name=_("run"))
    #: None when the code between steps failed.
    step = models.ForeignKey(
        Step, models.CASCADE, null=True, blank=True, related_name="failures", verbose_name=_("step")
    )
    number = models.PositiveIntegerField(_("number"))
    error = models.JSONField(_("error"))
    started_at = models.DateTimeField(_("started at"))
    finished_at = models.DateTimeField(_("finished at"))

    class Meta:
        verbose_name = _("attempt")
        verbose_name_plural = _("attempts")
        ordering = ["id"]

    def __str__(self) -> str:
        return f"{self.number}. {self.error.get('type', '')}"
