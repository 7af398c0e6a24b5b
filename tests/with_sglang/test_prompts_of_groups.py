"""What SGLang itself says that it computed of the prompts of groups."""

from __future__ import annotations

import asyncio
import re

import numpy as np
import pyarrow as pa
import pytest

from verl.agent.single_turn import episodes_of, roll_out
from verl.rollout.adapter import EngineSettings
from verl.rollout.base import SamplingParams
from verl.rollout.client import ClientEngine
from verl.rollout.own_process import OwnProcess
from verl.rollout.sglang.arguments import SGLANG

pytestmark = [pytest.mark.skipif(not SGLANG.installed, reason="SGLang is not installed"), pytest.mark.slow]

PROMPTS, SAMPLES, LENGTH, PREFILL = 32, 4, 60, 512


@pytest.mark.parametrize(("at_once", "cache"), [(2 * PROMPTS * SAMPLES, 1 << 16), (8, 1024)], ids=["ample", "scarce"])
def test_prompts_are_computed_about_once_for_all_responses_to_them(small, tmp_path, at_once, cache):
    """Whether or not all of them can be drawn, and kept, at once; but for those of the prefill that is under way as
    their first responses are through."""
    settings = EngineSettings(
        model_path=str(small / "model"),
        device="cpu",
        dtype="float32",
        max_model_len=LENGTH + 4,
        max_num_seqs=at_once,
        max_prefill_tokens=PREFILL,
        extra={"max_total_tokens": cache},
    )
    log = tmp_path / "sglang.log"
    backend = OwnProcess(SGLANG, settings, log=log, bucket_bytes=1 << 20)
    try:
        engine = ClientEngine(backend, eos_token_ids=[1], max_model_len=LENGTH + 4, vocab_size=16)
        prompts = np.random.default_rng(0).integers(3, 16, (PROMPTS, LENGTH)).tolist()
        table = pa.table({"row": range(PROMPTS), "prompt_ids": prompts})
        table = table.append_column("images", pa.array([[]] * PROMPTS, pa.list_(pa.string())))
        episodes = episodes_of(table, n=SAMPLES, seed=0, step=0)
        asyncio.run(roll_out(engine, episodes, SamplingParams(max_new_tokens=4)))
    finally:
        backend.close()
    computed, known = (
        sum(map(int, re.findall(rf"#{kind}-token: (\d+)", log.read_text()))) for kind in ("new", "cached")
    )
    assert computed + known == PROMPTS * SAMPLES * LENGTH
    assert computed < 2 * PROMPTS * LENGTH, computed
