"""Settings of the process that libraries read when they are first loaded."""

from __future__ import annotations

import os


def share_cores() -> None:
    """Before torch is imported: OpenMP threads that wait give their core away instead of spinning. On a machine that
    something else uses too, spinning makes small models many times slower. OMP_WAIT_POLICY, if set, stands."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
