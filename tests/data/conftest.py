"""A byte-level tokenizer (every text comes back as it was) and parquet files of prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if thinking %}<think>{% endif %}{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; puts <|bos|> before and <|end|> behind any text, as some tokenizers of real models do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|end|>", "<|user|>", "<|system|>", "<|assistant|>"]
    bytes_.add_special_tokens(special)
    ids = [(name, bytes_.token_to_id(name)) for name in special[:2]]
    bytes_.post_processor = processors.TemplateProcessing(single="<|bos|> $A <|end|>", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_, bos_token="<|bos|>", eos_token="<|end|>", chat_template=TEMPLATE
    )


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """write_rows(rows, name) -> path of a parquet file of these dicts."""

    def write(rows: list[dict], name: str = "train.parquet") -> str:
        path = tmp_path / name
        pq.write_table(pa.Table.from_pylist(rows), path)
        return str(path)

    return write


@pytest.fixture
def make_row() -> Callable[..., dict]:
    """make_row(question, ...) -> a row as data_preprocess writes it."""

    def make(question: str, answer: object = "1", **others: object) -> dict:
        return {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": question}],
            "reward_model": {"style": "rule", "ground_truth": answer},
            "extra_info": {"index": len(question)},
            **others,
        }

    return make
