from django.contrib import admin
from django.http import HttpRequest

from .models import BillingAccount, CreditEntry, DeliveryLog, Profile, WebhookEvent


class ReadOnly(admin.ModelAdmin):
    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: object = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: object = None) -> bool:
        return False


@admin.register(Profile)
class ProfileAdmin(admin.ModelAdmin):
    list_display = ["user", "marketing_opt_in", "email_verified", "onboarding_completed_at"]
    list_filter = ["marketing_opt_in", "email_verified"]
    list_select_related = ["user"]
    raw_id_fields = ["user"]


@admin.register(BillingAccount)
class BillingAccountAdmin(admin.ModelAdmin):
    list_display = ["owner", "plan", "credits", "credits_last_granted_at", "plan_expires_at", "is_active"]
    list_filter = ["plan", "is_active"]
    search_fields = ["=object_id"]
    #: The balance is the sum of the ledger: nobody writes it by hand.
    readonly_fields = ["credits", "credits_last_granted_at", "credits_anchor_day"]

    def get_queryset(self, request):
        return super().get_queryset(request).prefetch_related("owner")


@admin.register(CreditEntry)
class CreditEntryAdmin(ReadOnly):
    list_display = ["key", "account_id", "amount", "balance", "reason", "created_at"]
    search_fields = ["key"]
    date_hierarchy = "created_at"


@admin.register(WebhookEvent)
class WebhookEventAdmin(ReadOnly):
    list_display = ["key", "status", "received_at"]
    list_filter = ["status"]
    search_fields = ["key"]


@admin.register(DeliveryLog)
class DeliveryLogAdmin(ReadOnly):
    list_display = ["dedupe_key", "status", "attempts", "created_at", "sent_at"]
    list_filter = ["status"]
    search_fields = ["dedupe_key"]
