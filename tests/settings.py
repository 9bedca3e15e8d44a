"""The test project with the lab in it: jobs and a ledger for the tests that start real processes."""

import os

from testproject.settings import *  # noqa: F403
from testproject.settings import DJANGO_JOBS, INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "tests.lab"]
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

if "LAB_LEASE_SECONDS" in os.environ:
    DJANGO_JOBS = {**DJANGO_JOBS, "LEASE_SECONDS": float(os.environ["LAB_LEASE_SECONDS"])}
