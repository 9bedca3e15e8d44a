from django import forms
from django.contrib.auth.models import User

from .customers import PRICES


class SignUpForm(forms.Form):
    name = forms.CharField(max_length=100)
    email = forms.EmailField(max_length=150)
    wants_mail = forms.BooleanField(required=False, initial=True, label="Send me tips")

    def clean_email(self) -> str:
        email = self.cleaned_data["email"]
        if User.objects.filter(username=email).exists():
            raise forms.ValidationError("This address has signed up already.")
        return email


class BuyForm(forms.Form):
    customer = forms.ModelChoiceField(
        User.objects.filter(is_staff=False).order_by("-pk"), empty_label=None, to_field_name="username"
    )
    plan = forms.ChoiceField(choices=[(plan, f"{plan}, {price} EUR") for plan, price in PRICES.items()])
