import django
import pytest
from django.test import override_settings


@pytest.fixture(autouse=True)
def accounting(tmp_path, settings):
    """A folder for the pretended accounting service, of this test alone."""
    settings.ACCOUNTING_DIR = str(tmp_path / "accounting")


@pytest.fixture
def mail_folder(tmp_path):
    """Mail goes into files, as it does in the demo."""
    folder = str(tmp_path / "mails")
    backend = "django.core.mail.backends.filebased.EmailBackend"
    if django.VERSION >= (6, 1):
        sending = {"MAILERS": {"default": {"BACKEND": backend, "OPTIONS": {"file_path": folder}}}}
    else:
        sending = {"EMAIL_BACKEND": backend, "EMAIL_FILE_PATH": folder}
    with override_settings(MAIL_DIR=folder, **sending):
        yield folder
