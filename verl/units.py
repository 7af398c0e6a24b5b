"""Quantities and lists as text for messages."""

from __future__ import annotations

from collections.abc import Sequence


def gigabytes(count: int) -> str:
    """A number of bytes: "1.5 GB", or megabytes below 0.1 GB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.0f} MB"


def some(names: Sequence[str], limit: int = 8) -> str:
    """The first ``limit`` names, and how many there are in all if some are left out."""
    shown = ", ".join(names[:limit])
    return shown + (f", ... ({len(names)} in all)" if len(names) > limit else "")
