"""Each test here that asks for ``engine`` runs with every engine of a process of its own that is installed."""

from __future__ import annotations

import pytest

from verl.rollout.engines.registry import ADAPTERS
from verl.rollout.processes.adapter import Adapter


@pytest.fixture(params=[name for name, adapter in ADAPTERS.items() if adapter.installed])
def engine(request: pytest.FixtureRequest) -> Adapter:
    return ADAPTERS[request.param]
