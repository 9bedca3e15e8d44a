"""The settings object: defaults, the host's values, and no memory of either."""

import re
from pathlib import Path
from typing import get_type_hints

import pytest
from django.test import override_settings

from django_jobs.conf import Defaults, conf, known_keys


def test_a_key_the_host_does_not_set_has_its_default():
    with override_settings(DJANGO_JOBS={}):
        assert {key: getattr(conf, key) for key in known_keys()} == {
            key: getattr(Defaults, key) for key in known_keys()
        }


def test_a_project_without_the_setting_at_all_has_the_defaults(settings):
    del settings.DJANGO_JOBS

    assert conf.THREADS == Defaults.THREADS


def test_the_host_s_value_wins_even_when_it_is_false():
    with override_settings(DJANGO_JOBS={"RETENTION_DAYS": None, "GRACE_SECONDS": 0}):
        assert conf.RETENTION_DAYS is None
        assert conf.GRACE_SECONDS == 0


def test_a_changed_setting_is_seen_at_once_and_so_is_its_end():
    seen = [conf.THREADS]
    with override_settings(DJANGO_JOBS={"THREADS": 77}):
        seen.append(conf.THREADS)
    seen.append(conf.THREADS)
    assert seen == [Defaults.THREADS, 77, Defaults.THREADS]


def test_a_setting_that_does_not_exist_is_an_error_that_names_it():
    with pytest.raises(AttributeError, match="THREDS"):
        conf.THREDS  # noqa: B018


def test_only_keys_count_as_settings():
    assert all(key.isupper() for key in known_keys())
    with pytest.raises(AttributeError):
        conf.__wrapped__  # noqa: B018


@pytest.mark.parametrize("nonsense", [[], "THREADS=8", 8, None])
def test_what_is_no_dict_is_passed_over_and_left_to_the_checks(nonsense):
    with override_settings(DJANGO_JOBS=nonsense):
        assert conf.THREADS == Defaults.THREADS


@pytest.mark.parametrize(("key", "kind"), get_type_hints(Defaults).items())
def test_the_reference_names_the_type_of_each_setting(key, kind):
    page = (Path(__file__).parents[2] / "docs" / "reference" / "settings.md").read_text()
    name = kind.__name__ if isinstance(kind, type) else str(kind).replace("|", "or")
    assert re.search(rf"^`{key}` \(default .*\)\n: \*{name}\.\* ", page, re.MULTILINE)


def test_every_key_has_a_type():
    assert list(get_type_hints(Defaults)) == known_keys()
