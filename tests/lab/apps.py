import os

from django.apps import AppConfig


class LabConfig(AppConfig):
    name = "tests.lab"
    label = "lab"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        # Only in the processes that tests start; in the test process the fixture ``lab`` declares them.
        if os.environ.get("LAB"):
            from . import labjobs  # noqa: F401
