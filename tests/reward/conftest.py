from __future__ import annotations

import json

import pyarrow as pa
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from verl.config.sections.models import CustomRewardFunctionConfig, RewardConfig
from verl.data.schema import with_columns
from verl.reward.manager import RewardManager


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and <|end|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token="<|end|>")


@pytest.fixture
def table_of(tokenizer):
    """table_of(responses, truths) -> finished episodes."""

    def make(
        responses: list[str], truths: list[str] | None = None, source: str | list[str] = "openai/gsm8k"
    ) -> pa.Table:
        count = len(responses)
        ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in responses]
        return with_columns(
            pa.table({"row": pa.array(range(count), pa.int64())}),
            uid=[f"1-{row}-0" for row in range(count)],
            data_source=[source] * count if isinstance(source, str) else source,
            prompt=[json.dumps([{"role": "user", "content": f"question {row}"}]) for row in range(count)],
            ground_truth=truths or ["1"] * count,
            extra_info=[json.dumps({"row": row}) for row in range(count)],
            response_ids=ids,
        )

    return make


@pytest.fixture
def manager_of(tokenizer, tmp_path):
    """manager_of(users=text of a file or None, reward settings...) -> RewardManager, closed at the end."""
    made = []

    def make(users: str | None = None, kwargs: dict | None = None, **settings) -> RewardManager:
        path = tmp_path / "users.py"
        if users is not None:
            path.write_text(users)
        custom = CustomRewardFunctionConfig(path=str(path) if users is not None else None, reward_kwargs=kwargs or {})
        config = RewardConfig(**{"num_workers": 2, "timeout": 20, **settings})
        log = tmp_path / "run" / "reward_errors.jsonl"
        made.append(RewardManager(config, custom, tokenizer, data_sources=["openai/gsm8k"], error_log=log))
        return made[-1]

    yield make
    for manager in made:
        manager.close()
