"""Process settings that libraries read at import."""

from __future__ import annotations

import os


def share_cores() -> None:
    """Make waiting OpenMP threads sleep instead of spin. Call it before torch is imported.

    On a machine with other work, spinning makes small models many times slower. OMP_WAIT_POLICY takes precedence if it
    is set."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
