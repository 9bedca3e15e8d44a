"""
Plain read-only pages for jobs, runs, events and workers; nothing can be added, changed or deleted here.

Lists read no payloads and sort by the primary key, so that they stay quick however long the tables get.
"""

from typing import Any
from uuid import UUID

from django.contrib import admin
from django.forms.models import BaseInlineFormSet
from django.urls import reverse
from django.utils.html import format_html
from django.utils.translation import gettext_lazy as _

from . import clock
from .console import shown
from .health import ALIVE, span
from .models import Attempt, Event, Job, Log, Run, Step, Worker

#: So many rows of an inline are shown; a run may have ten thousand steps.
MOST_ROWS = 100

NOTHING = "-"

COUNTS = (("version", "queue", "priority"), ("passes", "attempt", "crashes"))


class ReadOnly:
    def has_add_permission(self, request: Any, obj: Any = None) -> bool:
        return False

    has_change_permission = has_delete_permission = has_add_permission

    @admin.display(description=_("took"))
    def took(self, row: Run | Step) -> str:
        return span(row.finished_at - row.started_at) if row.finished_at and row.started_at else NOTHING

    @admin.display(description=_("result"))
    def result(self, row: Run | Step) -> str:
        if row.error:
            return self.failure(row)
        return NOTHING if row.output is None else _text(shown(row.output, indent=2))

    @admin.display(description=_("error"))
    def failure(self, row: Run | Step | Attempt) -> str:
        error = row.error or {}
        lines = (f"{error.get('type', '')}: {error.get('message', '')}", error.get("traceback", ""))
        return _text("\n\n".join(lines).rstrip())


def _text(text: str) -> str:
    return format_html('<pre class="jobs-text">{}</pre>', text)


class ReadOnlyAdmin(ReadOnly, admin.ModelAdmin):
    actions = None
    list_per_page = 50
    show_full_result_count = False
    search_help_text = _("An exact id, or the beginning of a name")
    #: The field whose beginning a search looks for.
    named = "id"
    #: What may be long; lists leave it in the database.
    payloads: tuple[str, ...] = ()

    class Media:
        css = {"all": ["django_jobs/admin.css"]}

    def get_queryset(self, request: Any) -> Any:
        is_list = request.resolver_match and request.resolver_match.url_name.endswith("_changelist")
        return super().get_queryset(request).defer(*self.payloads if is_list else ())

    def get_search_results(self, request: Any, queryset: Any, search_term: str) -> tuple[Any, bool]:
        term = search_term.strip()
        try:
            return queryset.filter(pk=UUID(term)), False
        except ValueError:
            return queryset.filter(**{f"{self.named}__startswith": term}), False


class FirstRows(BaseInlineFormSet):
    """The first rows and no more, which an inline has no option for."""

    def get_queryset(self) -> Any:
        if not hasattr(self, "_first"):
            self._first = super().get_queryset()[:MOST_ROWS]
        return self._first


class LastRows(BaseInlineFormSet):
    """The last rows, in their order."""

    def get_queryset(self) -> Any:
        if not hasattr(self, "_last"):
            self._last = list(super().get_queryset().reverse()[:MOST_ROWS])[::-1]
        return self._last


class ReadOnlyInline(ReadOnly, admin.TabularInline):
    formset: type[BaseInlineFormSet] = FirstRows
    extra = 0
    classes = ("jobs-inline",)


class StepInline(ReadOnlyInline):
    model = Step
    fields = readonly_fields = (
        "name",
        "kind",
        "status",
        "attempts",
        "started_at",
        "took",
        "result",
        "unvisited",
    )


class AttemptInline(ReadOnlyInline):
    model = Attempt
    fields = readonly_fields = ("step", "number", "finished_at", "failure")
    verbose_name_plural = _("failed attempts")

    def get_queryset(self, request: Any) -> Any:
        return super().get_queryset(request).select_related("step")


class LogInline(ReadOnlyInline):
    model = Log
    formset = LastRows
    fields = readonly_fields = ("at", "importance", "step", "logger", "text")
    verbose_name_plural = _("log")

    @admin.display(description=_("level"))
    def importance(self, line: Log) -> str:
        return line.level_name

    @admin.display(description=_("message"))
    def text(self, line: Log) -> str:
        return _text(line.message)


class RunInline(ReadOnlyInline):
    model = Run
    fields = readonly_fields = ("link", "status", "queued_at", "took", "reason")

    def get_queryset(self, request: Any) -> Any:
        return super().get_queryset(request).defer("output", "error")

    @admin.display(description=_("job"))
    def link(self, run: Run) -> str:
        url = reverse("admin:django_jobs_run_change", args=[run.pk])
        return format_html('<a href="{}">{}</a>', url, run.job_id)


class JobFilter(admin.SimpleListFilter):
    """Filter by job: the names come from the small table, not from all the runs."""

    title = _("job")
    parameter_name = "job_id"

    def lookups(self, request: Any, model_admin: Any) -> list[tuple[str, str]]:
        return [(name, name) for name in Job.objects.order_by("pk").values_list("pk", flat=True)]

    def queryset(self, request: Any, queryset: Any) -> Any:
        return queryset.filter(job_id=self.value()) if self.value() else queryset


@admin.register(Run)
class RunAdmin(ReadOnlyAdmin):
    list_display = ("job_id", "status", "queued_at", "took", "reason")
    list_filter = ("status", JobFilter, "queued_at")
    ordering = ("-id",)
    sortable_by = ()
    search_fields = ("id",)
    named = "job_id"
    payloads = ("output", "error")
    inlines = (StepInline, AttemptInline, LogInline)
    readonly_fields = ("took", "result")
    fieldsets = (
        (None, {"fields": ("id", "job_id", "status", "reason", "event", "cron", "scheduled_for", "result")}),
        (_("Times"), {"fields": ("queued_at", "started_at", "finished_at", "retried_at", "wake_at", "took")}),
        (_("Details"), {"fields": (*COUNTS, "claimed_by", "parent", "replay_of")}),
    )


@admin.register(Event)
class EventAdmin(ReadOnlyAdmin):
    list_display = ("name", "key", "received_at", "occurred_at")
    list_filter = ("received_at",)
    ordering = ("-id",)
    sortable_by = ()
    search_fields = ("id",)
    named = "name"
    payloads = ("data",)
    inlines = (RunInline,)
    fields = readonly_fields = ("id", "name", "key", "occurred_at", "received_at", "content")

    @admin.display(description=_("data"))
    def content(self, event: Event) -> str:
        return _text(shown(event.data, indent=2))


@admin.register(Job)
class JobAdmin(ReadOnlyAdmin):
    list_display = ("id", "group", "started_by", "registered", "next_run_at", "runs")
    search_fields = ("id",)
    exclude = ("triggers", "declared", "paused_after")
    readonly_fields = ("started_by", "registered", "runs")

    @admin.display(description=_("triggers"))
    def started_by(self, job: Job) -> str:
        return ", ".join(job.triggers)

    @admin.display(description=_("registered"), boolean=True)
    def registered(self, job: Job) -> bool:
        return job.declared and not job.closed_by

    @admin.display(description=_("runs"))
    def runs(self, job: Job) -> str:
        url = reverse("admin:django_jobs_run_changelist", query={"job_id": job.pk})
        return format_html('<a href="{}">{}</a>', url, _("Runs"))


@admin.register(Worker)
class WorkerAdmin(ReadOnlyAdmin):
    list_display = ("__str__", "alive", "busy", "processes", "threads", "started_at", "heartbeat_at")
    readonly_fields = ("alive",)

    @admin.display(description=_("alive"), boolean=True)
    def alive(self, worker: Worker) -> bool:
        return clock.now() - worker.heartbeat_at < ALIVE
