from django.contrib import admin

from .models import Invoice


@admin.register(Invoice)
class InvoiceAdmin(admin.ModelAdmin):
    list_display = ["__str__", "account", "plan", "amount", "booking", "created_at"]
    list_select_related = ["account"]
    readonly_fields = ["number", "booking"]
