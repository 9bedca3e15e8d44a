"""
What a host gets when it installs the distribution.
"""

import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, metadata, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import django_jobs

DISTRIBUTION = "django-jobs-engine"
PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def test_the_version_is_the_one_of_the_package():
    assert version(DISTRIBUTION) == django_jobs.__version__


def test_the_changelog_knows_this_version():
    changelog = (Path(__file__).parents[2] / "CHANGELOG.md").read_text()
    assert f"## [{django_jobs.__version__}]" in changelog


def test_the_types_are_shipped():
    assert (Path(django_jobs.__file__).parent / "py.typed").exists()


def test_a_plain_install_brings_three_packages():
    names = {Requirement(line).name.lower() for line in PROJECT["dependencies"]}
    assert names - {"asgiref"} == {"django", "django-q2", "croniter"}  # That one comes with Django anyway.


def test_the_installed_django_q2_is_in_the_tested_range():
    [wanted] = [req for req in map(Requirement, PROJECT["dependencies"]) if req.name == "django-q2"]
    assert wanted.specifier.contains(version("django-q2"))


def test_the_licence_is_an_spdx_name():
    assert metadata(DISTRIBUTION)["License-Expression"] == "MIT"


@pytest.mark.parametrize("name", django_jobs.__all__)
def test_every_public_name_can_be_imported(name):
    assert getattr(django_jobs, name) is not None


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        django_jobs.no_such_name  # noqa: B018 (the access is the test)


def test_importing_the_package_needs_no_settings_and_no_third_party_module():
    unwanted = ("django", "django_q", "croniter")
    source = f"import sys, django_jobs; sys.exit(any(name in sys.modules for name in {unwanted}))"
    subprocess.run([sys.executable, "-c", source], check=True)


def test_pytest_finds_the_plugin_by_its_entry_point():
    [point] = [point for point in entry_points(group="pytest11") if point.name == "django_jobs"]
    assert point.value == "django_jobs.pytest_plugin"


def test_the_fixture_of_the_entry_point_is_there(request):
    assert request.config.pluginmanager.hasplugin("django_jobs")
