"""What a reward model reads of a prompt and a response."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from helpers import make_model
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from verl.config.sections.models import RewardModelConfig
from verl.config.sections.reward import RewardModelModelConfig
from verl.data.ragged import Ragged
from verl.errors import UserError
from verl.reward.model_inputs import RewardModelInputs


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> str:
    """The folder of a model whose tokens are letters, with a chat template that puts texts one after the other."""
    folder = tmp_path_factory.mktemp("letters") / "model"
    make_model(folder)
    return str(folder)


def inputs_of(path: str, tokenizer: PreTrainedTokenizerFast, pad: int | None, source: str | None = None):
    config = RewardModelConfig(enable=True, model=RewardModelModelConfig(path=path, input_tokenizer=source))
    return RewardModelInputs(config, tokenizer, pad)


def table_of(prompt_ids: list[list[int]], response_ids: list[list[int]], texts: list[str]) -> pa.Table:
    prompts = [json.dumps([{"role": "user", "content": text}]) for text in texts]
    columns = {"prompt_ids": prompt_ids, "response_ids": response_ids}
    ids = {name: Ragged.from_rows(rows, "int32").to_column() for name, rows in columns.items()}
    return pa.table({"prompt": prompts, **ids})


def read(table: pa.Table) -> list[list[int]]:
    assert table["response_ids"].to_pylist() == [[0]] * len(table)
    return table["prompt_ids"].to_pylist()


def test_with_the_same_tokenizer_token_ids_stay(letters):
    tokenizer = AutoTokenizer.from_pretrained(letters)
    table = table_of([[5, 6], [7]], [[8, 1], [9, 10, 11]], ["", ""])
    assert read(inputs_of(letters, tokenizer, pad=None)(table)) == [[5, 6, 8, 1], [7, 9, 10, 11]]


def test_padding_at_the_end_is_not_read(letters):
    """transformers pools the last token that is not the pad token."""
    tokenizer = AutoTokenizer.from_pretrained(letters)
    table = table_of([[5, 1], [1]], [[8, 1, 1], [1]], ["", ""])
    assert read(inputs_of(letters, tokenizer, pad=1)(table)) == [[5, 1, 8], [1]]


def test_with_another_tokenizer_the_conversation_is_tokenised_again(tmp_path, letters):
    policy = AutoTokenizer.from_pretrained(letters)
    own = AutoTokenizer.from_pretrained(letters)
    own.add_tokens(["<turn>"], special_tokens=True)
    own.chat_template = "{% for m in messages %}<turn>{{ m['content'] }}{{ m['role'][0] }}{% endfor %}"
    own.save_pretrained(tmp_path / "own")
    response = [*policy("abc")["input_ids"], policy.eos_token_id]
    table = table_of([policy("12")["input_ids"]], [response], ["12"])
    (found,) = read(inputs_of(str(tmp_path / "own"), policy, None, source=letters)(table))
    assert own.decode(found).replace(" ", "") == "<turn>12<turn>abca"  # it has no letter "u" (user), but "a"

    with pytest.raises(
        UserError,
        match=r"its vocabulary differs(.|\n)*reward_model\.model\.input_tokenizer",
    ):
        inputs_of(str(tmp_path / "own"), policy, None)
    own.chat_template = None
    own.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UserError, match="no chat template"):
        inputs_of(str(tmp_path / "plain"), policy, None, source=letters)
