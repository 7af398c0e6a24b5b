from pathlib import Path

import pytest

from verl.tracking import RunInfo


@pytest.fixture
def make_run(tmp_path):
    def make(**fields) -> RunInfo:
        defaults = {"project": "gsm8k", "experiment": "demo", "folder": tmp_path / "run", "total_steps": 20}
        return RunInfo(**{**defaults, **fields})

    return make


@pytest.fixture
def repository() -> Path:
    return Path(__file__).resolve().parents[2]
