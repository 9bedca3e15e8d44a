"""
The accounting service: somebody else's, over the network, and not always in the mood.

Here it is a folder (``ACCOUNTING_DIR``). Like the real one it drops the first connection about each
invoice, and booking the same invoice again is answered with the booking there is.
"""

from pathlib import Path

from django.conf import settings


def book(reference: str, amount: str) -> str:
    """Book an invoice and return the booking's name; raise ``ConnectionError`` now and then."""
    folder = Path(settings.ACCOUNTING_DIR)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{reference}.txt"
    if not file.exists():
        file.touch()
        raise ConnectionError("The accounting service closed the connection.")
    file.write_text(amount)
    return f"booking-{reference}"
