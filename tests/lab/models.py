from django.db import models


class Effect(models.Model):
    """The ledger: one row each time a job's code really did something."""

    run = models.UUIDField(db_index=True)
    name = models.CharField(max_length=100)
    pid = models.IntegerField()
    at = models.FloatField()

    def __str__(self) -> str:
        return f"{self.name} of {self.run}"
