from django.apps import AppConfig
from django.utils.translation import gettext_lazy as _

from django_jobs import flags

#: Every flag the catalogue knows is on; a host switches off in ``DJANGO_JOBS["FLAGS"]`` what it does not want.
FLAGS = {
    "payment": {"enabled": True},
    "pricing": {"credits": {"enabled": True}},
    "email": {"inactive_email_schedule": [7, 30, 90]},
    "newsletter": {"enabled": True},
    "notifications": {"enabled": True},
    "sms": {"enabled": True},
    "admin_notifications": {"enabled": True},
}


class CatalogConfig(AppConfig):
    name = "django_jobs.catalog"
    label = "django_jobs_catalog"
    verbose_name = _("Stock jobs")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        flags.provide(FLAGS)
