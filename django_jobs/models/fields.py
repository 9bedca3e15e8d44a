"""The column types and the id that the models share."""

import json
import os
import time
import uuid
from typing import Any

from django.db import models

from .. import payloads


def uuid7() -> uuid.UUID:
    """
    Return a UUID version 7 (RFC 9562, section 6.2, method 3).

    Made here and not by the database, so that an event and its runs are written in two statements
    whatever their number; ordered by time, so that an index on it grows at one end.
    """
    nanoseconds = time.time_ns()
    milliseconds, rest = divmod(nanoseconds, 1_000_000)
    fraction = rest * 4096 // 1_000_000
    noise = int.from_bytes(os.urandom(8), "big") >> 2
    return uuid.UUID(int=milliseconds << 80 | 7 << 76 | fraction << 64 | 2 << 62 | noise)


class PayloadEncoder(json.JSONEncoder):
    def encode(self, o: Any) -> str:
        return payloads.dumps(o, where="the data")


class PayloadDecoder(json.JSONDecoder):
    def decode(self, s: str, *args: Any) -> Any:
        return payloads.loads(s)


class PayloadField(models.TextField):
    """
    A value in typed JSON, kept as text.

    Text and not the database's JSON type: PostgreSQL's ``jsonb`` reorders keys, and what a step
    returns on replay must be what it returned at first.
    """

    def from_db_value(self, value: str | None, expression: Any, connection: Any) -> Any:
        return None if value is None else payloads.loads(value)

    def get_prep_value(self, value: Any) -> str | None:
        return None if value is None else payloads.dumps(value, where=f"the {self.name}")

    def value_to_string(self, obj: models.Model) -> str:
        return self.get_prep_value(self.value_from_object(obj)) or ""

    def to_python(self, value: Any) -> Any:
        return value


class NameField(models.CharField):
    """A CharField that tells "a" from "A" and from "a " on MariaDB and MySQL too."""

    def db_parameters(self, connection: Any) -> Any:
        parameters = super().db_parameters(connection)
        if connection.vendor == "mysql":
            parameters["collation"] = (
                "utf8mb4_nopad_bin" if connection.mysql_is_mariadb else "utf8mb4_0900_bin"
            )
        return parameters
