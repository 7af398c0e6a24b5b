"""The penalty of responses that near the length limit."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.algorithms.overlong import overlong_penalties


def settings(**chosen):
    return SimpleNamespace(**{"enable": True, "len": 4, "penalty_factor": 1.0, **chosen})


def by_definition(length: int, limit: int, buffer: int) -> float:
    """Equation 13 of the DAPO paper: L_max is the limit, L_cache the buffer."""
    if length <= limit - buffer:
        return 0.0
    if length <= limit:
        return ((limit - buffer) - length) / buffer
    return -1.0


@given(st.lists(st.integers(0, 60), max_size=6), st.integers(1, 50), st.floats(0, 3), st.data())
def test_penalties_are_the_papers(lengths, limit, factor, data):
    buffer = data.draw(st.integers(1, limit))
    found = overlong_penalties(np.array(lengths, np.int64), settings(len=buffer, penalty_factor=factor), limit)
    assert found.tolist() == pytest.approx([factor * by_definition(length, limit, buffer) for length in lengths])


def test_worked_by_hand():
    found = overlong_penalties(np.array([5, 6, 8, 10]), settings(penalty_factor=2.0), 10)
    assert found.tolist() == [0.0, 0.0, -1.0, -2.0]


def test_nothing_is_taken_off_where_it_is_not_enabled():
    assert overlong_penalties(np.array([5, 10]), settings(enable=False, len=0), 10).tolist() == [0.0, 0.0]
