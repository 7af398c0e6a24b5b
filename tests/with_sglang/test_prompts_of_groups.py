"""What SGLang itself says that it computed of the prompts of groups."""

from __future__ import annotations

import asyncio
import re

import numpy as np
import pyarrow as pa
import pytest
from logged import sglang

from verl.agent.single_turn import episodes_of, roll_out
from verl.rollout.contract.base import SamplingParams
from verl.rollout.engines.sglang.arguments import SGLANG

pytestmark = [pytest.mark.skipif(not SGLANG.installed, reason="SGLang is not installed"), pytest.mark.slow]

PROMPTS, SAMPLES, LENGTH, PREFILL = 32, 4, 60, 512


@pytest.mark.parametrize(("at_once", "cache"), [(2 * PROMPTS * SAMPLES, 1 << 16), (8, 1024)], ids=["ample", "scarce"])
def test_prompts_are_computed_about_once_for_all_responses_to_them(small, tmp_path, at_once, cache):
    """Whether or not all of them can be drawn, and kept, at once; but for those of the prefill that is under way as
    their first responses are through."""
    prompts = np.random.default_rng(0).integers(3, 16, (PROMPTS, LENGTH)).tolist()
    table = pa.table({"row": range(PROMPTS), "prompt_ids": prompts})
    table = table.append_column("images", pa.array([[]] * PROMPTS, pa.list_(pa.string())))
    episodes = episodes_of(table, n=SAMPLES, seed=0, step=0)
    log, sizes = tmp_path / "sglang.log", {"length": LENGTH + 4, "prefill": PREFILL, "cache": cache}
    with sglang(small / "model", log, at_once=at_once, **sizes) as engine:
        asyncio.run(roll_out(engine, episodes, SamplingParams(max_new_tokens=4)))
    computed, known = (
        sum(map(int, re.findall(rf"#{kind}-token: (\d+)", log.read_text()))) for kind in ("new", "cached")
    )
    assert computed + known == PROMPTS * SAMPLES * LENGTH
    assert computed < 2 * PROMPTS * LENGTH, computed
