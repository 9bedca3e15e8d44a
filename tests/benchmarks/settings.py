"""
The settings of the measured processes: the databases and the log of the test project, without its apps.

A benchmark measures the engine. What a host project adds in memory and start-up time is its own.
"""

from testproject.settings import (
    DATABASES,
    DEFAULT_AUTO_FIELD,
    LOGGING,
    Q_CLUSTER,
    SECRET_KEY,
    TIME_ZONE,
    USE_TZ,
)

__all__ = ["DATABASES", "DEFAULT_AUTO_FIELD", "LOGGING", "Q_CLUSTER", "SECRET_KEY", "TIME_ZONE", "USE_TZ"]

DEBUG = False
INSTALLED_APPS = [
    "django.contrib.contenttypes",
    "django.contrib.auth",
    "django_q",
    "django_jobs",
    "tests.benchmarks",
]
