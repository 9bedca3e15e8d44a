"""Mails from templates, and the text of a mail that has only HTML."""

import pytest
from django.template import TemplateDoesNotExist
from django.utils import translation

from django_jobs.catalog import send_template_email
from django_jobs.catalog.text import html_to_text
from django_jobs.models import Event


@pytest.fixture
def templates(tmp_path, settings):
    """Write template files: ``templates(subject="...", body="...")`` under ``greeting/``."""

    def write(**files):
        folder = tmp_path / "greeting"
        folder.mkdir()
        for name, text in files.items():
            (folder / name.replace("_", ".")).write_text(text)
        settings.TEMPLATES = [{**settings.TEMPLATES[0], "DIRS": [str(tmp_path)]}]

    return write


def sent():
    return Event.objects.get(name="email/send").data


@pytest.mark.django_db
def test_the_parts_are_rendered_and_only_html_is_escaped(templates):
    templates(subject_txt="Hello {{ name }}\n", body_txt="Dear {{ name }}", body_html="<p>{{ name }}</p>")
    send_template_email("greeting", {"name": "Ada & <Grace>"}, to="ada@example.com")

    assert sent()["subject"] == "Hello Ada & <Grace>"
    assert sent()["text"] == "Dear Ada & <Grace>"
    assert sent()["html"] == "<p>Ada &amp; &lt;Grace&gt;</p>"


@pytest.mark.django_db
def test_a_line_break_in_a_name_does_not_reach_the_subject(templates):
    templates(subject_txt="Hello {{ name }}", body_txt="x")
    send_template_email("greeting", {"name": "Ada\nBcc: all@example.com"}, to="ada@example.com")
    assert sent()["subject"] == "Hello Ada Bcc: all@example.com"


@pytest.mark.django_db
@pytest.mark.parametrize("body", ["body_txt", "body_html"])
def test_one_of_the_bodies_is_enough(templates, body):
    templates(subject_txt="Hello", **{body: "x"})
    send_template_email("greeting", to="ada@example.com")
    assert {"text", "html"} & set(sent()) == {"text" if body == "body_txt" else "html"}


@pytest.mark.django_db
def test_no_body_at_all_is_an_error_here_and_now(templates):
    templates(subject_txt="Hello")
    with pytest.raises(TemplateDoesNotExist, match="greeting/body.txt"):
        send_template_email("greeting", to="ada@example.com")
    assert not Event.objects.exists()


@pytest.mark.django_db
def test_a_missing_base_is_not_mistaken_for_a_missing_body(templates):
    templates(subject_txt="Hello", body_txt="x", body_html='{% extends "nowhere.html" %}')
    with pytest.raises(TemplateDoesNotExist, match=r"nowhere\.html"):
        send_template_email("greeting", to="ada@example.com")


@pytest.mark.django_db
def test_the_language_that_is_active_is_the_mails(templates):
    templates(subject_txt="{% load i18n %}{% translate 'Monday' %}", body_txt="x")
    with translation.override("de"):
        send_template_email("greeting", to="ada@example.com")
    assert sent()["subject"] == "Montag"


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>One</p><p>Two</p>", "One\n\nTwo"),
        ("<p>One<br>Two</p>", "One\nTwo"),
        ("one\n   two\tthree", "one two three"),
        ("<ul><li>One</li><li>Two</li></ul><p>End</p>", "- One\n- Two\n\nEnd"),
        ("<style>p { color: red }</style><script>x()</script><p>Hi</p>", "Hi"),
        ("<head><title>Title</title></head><body>Hi</body>", "Hi"),
        ("Tom &amp; Jerry &lt;3", "Tom & Jerry <3"),
        ('<a href="https://example.com/x">here</a>', "here (https://example.com/x)"),
        ('<a href="https://example.com">https://example.com</a>', "https://example.com"),
        ('<a href="mailto:a@b.c">write</a>', "write"),
        ('<img src="x.png" alt="Our logo"> us', "Our logo us"),
        ("<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>", "a b\n\nc"),
        ("<p>unclosed <b>tags", "unclosed tags"),
        ("", ""),
    ],
)
def test_html_becomes_the_text_a_person_reads(html, text):
    assert html_to_text(html) == text
