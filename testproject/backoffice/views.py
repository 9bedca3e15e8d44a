from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST

from django_jobs import registry
from django_jobs.models import Run

from . import customers
from .forms import BuyForm, SignUpForm


def home(request: HttpRequest, sign_up: SignUpForm | None = None, buy: BuyForm | None = None) -> HttpResponse:
    context = {
        "sign_up": sign_up or SignUpForm(prefix="new", label_suffix=""),
        "buy": buy or BuyForm(prefix="sale", label_suffix=""),
        "jobs": registry.declared(),
        "runs": Run.objects.order_by("-queued_at", "-pk").defer("output", "error")[:12],
    }
    wrong = (sign_up and sign_up.errors) or (buy and buy.errors)
    return render(request, "backoffice/home.html", context, status=422 if wrong else 200)


@require_POST
def sign_up(request: HttpRequest) -> HttpResponse:
    form = SignUpForm(request.POST, prefix="new", label_suffix="")
    if not form.is_valid():
        return home(request, sign_up=form)
    user = customers.sign_up(**form.cleaned_data)
    messages.success(request, f"{user.first_name} is signed up, and the welcome sequence has started.")
    return redirect("home")


@require_POST
def buy(request: HttpRequest) -> HttpResponse:
    form = BuyForm(request.POST, prefix="sale", label_suffix="")
    if not form.is_valid():
        return home(request, buy=form)
    user, plan = form.cleaned_data["customer"], form.cleaned_data["plan"]
    customers.buy_plan(user, plan)
    messages.success(request, f"{user.first_name} has bought {plan}, and the invoice is on its way.")
    return redirect("home")
