"""The test project with the lab in it: jobs and a ledger for the tests that start real processes."""

from testproject.settings import *  # noqa: F403
from testproject.settings import INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "tests.lab"]
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
