"""What SGLang itself says of how many responses it draws at a time."""

from __future__ import annotations

import asyncio
import re

import numpy as np
import pytest
from logged import sglang

from verl.rollout.contract.base import Request, SamplingParams
from verl.rollout.engines.sglang.arguments import SGLANG

pytestmark = [pytest.mark.skipif(not SGLANG.installed, reason="SGLang is not installed"), pytest.mark.slow]

AT_ONCE, LENGTH, PREFILL, RESPONSE = 8, 20, 64, 100


@pytest.mark.parametrize("asked", [AT_ONCE, AT_ONCE + 2])
def test_max_num_seqs_responses_are_generated_at_once_where_a_prefill_is_cut_and_no_more(small, tmp_path, asked):
    prompts = np.random.default_rng(0).integers(3, 16, (asked, LENGTH)).tolist()
    sampling = SamplingParams(max_new_tokens=RESPONSE, ignore_eos=True)
    requests = [Request(str(number), prompt, sampling) for number, prompt in enumerate(prompts)]
    log, sizes = tmp_path / "sglang.log", {"length": LENGTH + RESPONSE, "prefill": PREFILL, "cache": 1 << 14}
    with sglang(small / "model", log, at_once=AT_ONCE, **sizes) as engine:
        results = asyncio.run(engine.generate(requests))
    assert all(len(result.response_ids) == RESPONSE for result in results)
    running = [int(count) for count in re.findall(r"Decode batch, #running-req: (\d+)", log.read_text())]
    assert max(running) == AT_ONCE, running
