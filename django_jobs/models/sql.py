"""What differs between the databases in the few statements written by hand."""

import uuid
from datetime import datetime
from typing import Any

from django.utils.dateparse import parse_datetime


def adapt(connection: Any, value: Any) -> Any:
    """Turn ``value`` into what the driver of ``connection`` takes in a hand-written statement."""
    if isinstance(value, datetime):
        return connection.ops.adapt_datetimefield_value(value)
    if isinstance(value, uuid.UUID) and not connection.features.has_native_uuid_field:
        return value.hex
    return value


def share_lock(connection: Any) -> str:
    """
    Return the clause that keeps a row as it is until the end of the statement's transaction.

    SQLite has one writer at a time and needs none.
    """
    return {"postgresql": " FOR SHARE", "mysql": " LOCK IN SHARE MODE"}.get(connection.vendor, "")


def instant(connection: Any, value: Any) -> datetime | None:
    """Turn what a hand-written statement of ``connection`` returned for a time into an aware datetime."""
    if isinstance(value, str):
        value = parse_datetime(value)
    if value is not None and value.tzinfo is None:
        value = value.replace(tzinfo=connection.timezone)
    return value


def as_uuid(value: Any) -> uuid.UUID:
    """Turn what a hand-written statement returned for an id into one."""
    return value if isinstance(value, uuid.UUID) else uuid.UUID(value)


def placeholder(connection: Any, field: Any) -> str:
    """Return the placeholder of a value that is compared with the column of ``field`` where no column says its type."""
    if connection.vendor == "sqlite":
        return "%s"  # It has no types, and casts a time to a number.
    collation = field.db_parameters(connection).get("collation") if connection.vendor == "mysql" else None
    return f"CAST(%s AS {field.cast_db_type(connection)})" + (f" COLLATE {collation}" if collation else "")
