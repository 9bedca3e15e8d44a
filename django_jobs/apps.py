from typing import Any

from django.apps import AppConfig
from django.db import connections
from django.db.models.signals import post_migrate
from django.utils.translation import gettext_lazy as _


class DjangoJobsConfig(AppConfig):
    name = "django_jobs"
    label = "django_jobs"
    verbose_name = _("Django Jobs")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Find every app's jobs. Gates are applied by the registry, live; no query is made here."""
        from . import (
            checks,  # noqa: F401 (registers the system checks)
            events,  # noqa: F401 (connects emission by signal)
            housekeeping,  # noqa: F401 (declares the engine's own job)
            operations,  # noqa: F401 (declares a job of the engine's own)
            registry,
        )

        registry.autodiscover()
        post_migrate.connect(_write_down, sender=self, dispatch_uid="django_jobs.sync")


def _write_down(sender: Any, using: str, **kwargs: Any) -> None:
    from . import scheduler
    from .models import Job

    if Job._meta.db_table not in connections[using].introspection.table_names():
        return  # Migrated back to nothing.
    scheduler.write_down(using=using)
