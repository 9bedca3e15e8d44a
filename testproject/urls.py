from django.contrib import admin
from django.urls import include, path

urlpatterns = [
    path("", include("testproject.backoffice.urls")),
    path("", include("django_jobs.urls")),
    path("admin/", admin.site.urls),
]
