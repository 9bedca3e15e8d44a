"""
Where events arrive over HTTP; a host includes this at its root, which is where Inngest's SDKs look.
"""

from django.urls import path

from . import endpoint

app_name = "django_jobs"

urlpatterns = [
    path("e/<str:key>", endpoint.receive, name="events"),
]
