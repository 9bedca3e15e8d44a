"""The stock jobs, group by group; autodiscovery imports this module."""

from . import billing, lifecycle, notifications

__all__ = ["billing", "lifecycle", "notifications"]
