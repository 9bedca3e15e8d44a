"""
Settings of the test project: a small back office that installs django_jobs.

What differs between machines comes from the environment: ``DATABASE_URL``, ``EMAIL_URL``, ``DEBUG``,
``SECRET_KEY``, ``EVENT_KEYS`` and the feature flags. Unset, it runs on SQLite, puts mail into files
under ``mails/`` and takes no events over HTTP.
"""

import os
import tempfile
from datetime import timedelta
from pathlib import Path

import django
import environ

BASE_DIR = Path(__file__).resolve().parent.parent
env = environ.Env()

DEBUG = env.bool("DEBUG", default=True)
SECRET_KEY = env.str("SECRET_KEY", default="for the test project only, and known to everybody")
ALLOWED_HOSTS = env.list("ALLOWED_HOSTS", default=["localhost", "127.0.0.1", "[::1]"])

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "django_q",
    "django_jobs",
    "django_jobs.catalog",
    "testproject.backoffice",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]

ROOT_URLCONF = "testproject.urls"
WSGI_APPLICATION = "testproject.wsgi.application"
ASGI_APPLICATION = "testproject.asgi.application"

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]

# What each database wants for jobs; docs/howto/databases.md says why.
TUNING: dict[str, dict] = {
    "django.db.backends.sqlite3": {
        "OPTIONS": {
            "transaction_mode": "IMMEDIATE",
            "timeout": 20,
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
        },
        # Real processes and threads share the test database, so it is a file, one for each test process.
        "TEST": {"NAME": os.path.join(tempfile.gettempdir(), f"django_jobs_test_{os.getpid()}.sqlite3")},
    },
    "django.db.backends.postgresql": {"CONN_MAX_AGE": 60},
    "django.db.backends.mysql": {
        "CONN_MAX_AGE": 60,
        "OPTIONS": {"charset": "utf8mb4", "isolation_level": "read committed"},
        "TEST": {"CHARSET": "utf8mb4"},
    },
}

database = env.db("DATABASE_URL", default=f"sqlite:///{BASE_DIR / 'db.sqlite3'}")
DATABASES = {"default": database | TUNING.get(database["ENGINE"], {})}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

mail = env.email_url("EMAIL_URL", default=f"filemail:///{BASE_DIR / 'mails'}")
#: The folder that mail goes into; "" when it goes elsewhere.
MAIL_DIR = mail["EMAIL_FILE_PATH"] if "filebased" in mail["EMAIL_BACKEND"] else ""
if django.VERSION < (6, 1):
    vars().update(mail)
else:
    options = {
        "file_path": mail["EMAIL_FILE_PATH"],
        "host": mail["EMAIL_HOST"],
        "port": mail["EMAIL_PORT"],
        "username": mail["EMAIL_HOST_USER"],
        "password": mail["EMAIL_HOST_PASSWORD"],
        "use_tls": mail.get("EMAIL_USE_TLS"),
        "use_ssl": mail.get("EMAIL_USE_SSL"),
    }
    MAILERS = {
        "default": {
            "BACKEND": mail["EMAIL_BACKEND"],
            "OPTIONS": {name: value for name, value in options.items() if value},
        },
    }
#: What the back office's pretended accounting service keeps.
ACCOUNTING_DIR = env.str("ACCOUNTING_DIR", default=str(BASE_DIR / "accounting"))
DEFAULT_FROM_EMAIL = "Back office <office@example.com>"

LANGUAGE_CODE = "en"
TIME_ZONE = "UTC"
USE_TZ = True
STATIC_URL = "static/"

Q_CLUSTER = {
    "name": "testproject",
    "orm": "default",
    "label": "Queue",
    # django-q2 warns unless retry is longer than timeout. Neither touches runs, which have leases.
    "timeout": 60,
    "retry": 120,
}

DJANGO_JOBS = {
    "EVENT_KEYS": env.list("EVENT_KEYS", default=[]),
    "FLAGS": {
        "payment": {"enabled": env.bool("PAYMENT_ENABLED", default=True)},
        "pricing": {"credits": {"enabled": env.bool("CREDITS_ENABLED", default=True)}},
        "notifications": {"enabled": env.bool("NOTIFICATIONS_ENABLED", default=True)},
    },
    "CATALOG": {
        # A day of the onboarding; `make demo` makes it 0.4 s.
        "DAY": timedelta(seconds=env.float("ONBOARDING_DAY_SECONDS", default=86_400)),
        "email": {
            "product": {"name": "Back office", "url": env.str("SITE_URL", default="http://127.0.0.1:8000/")},
        },
    },
}

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "line": {"format": "{asctime} {levelname:<7} {message}", "style": "{", "datefmt": "%H:%M:%S"},
    },
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "line"}},
    "loggers": {
        "django_jobs": {"handlers": ["console"], "level": env.str("JOBS_LOG_LEVEL", default="INFO")},
        "django-q": {"handlers": ["console"], "level": "WARNING"},
    },
}
