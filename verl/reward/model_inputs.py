"""Builds the reward model's inputs: prompt and response of each row as token ids of the reward model's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from verl.data.ragged import Ragged
from verl.data.tokenizer import decode, load_tokenizer
from verl.errors import UserError

if TYPE_CHECKING:
    from verl.config.sections.models import RewardModelConfig

KEY = "reward_model.model"


class RewardModelInputs:
    """Converts a table of responses into rows for the reward model.

    tokenizer: the policy's tokenizer.
    pad_token_id: from the reward model's config. As in transformers, the score is that of the last other token.

    With ``input_tokenizer``, it decodes the responses, and the reward model's own tokenizer encodes the conversation
    through its chat template. Without it, the token ids stay as they are. Raises UserError if the two tokenizers then
    have different vocabularies.
    """

    def __init__(self, config: RewardModelConfig, tokenizer: PreTrainedTokenizerBase, pad_token_id: int | None):
        self._pad = pad_token_id
        self._reader: PreTrainedTokenizerBase | None = None
        model, trust = config.model, config.model.trust_remote_code
        own = _tokenizer_of(model.path, trust, needed=model.input_tokenizer is not None)
        if model.input_tokenizer is not None:
            assert own is not None
            if not own.chat_template:
                raise UserError(
                    f"{KEY}.path={model.path}: its tokenizer has no chat template, which conversations need"
                )
            self._reader, self._writer = load_tokenizer(model.input_tokenizer, trust), own
        elif own is not None and own.get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"{KEY}.path={model.path}: its vocabulary differs from that of the policy's tokenizer. Set "
                f"{KEY}.input_tokenizer to the policy's tokenizer: responses are then tokenized again."
            )

    def __call__(self, table: pa.Table) -> pa.Table:
        """Rows for ``TrainEngine.values``: prompt_ids holds the whole input. response_ids holds one token after it,
        which the model never reads; its value is the value of the last token of the input."""
        rows = table.select(["prompt", "prompt_ids", "response_ids"]).to_pylist()
        read = [self._without_padding(self._ids(row)) for row in rows]
        behind = Ragged.from_rows([[0]] * len(read), np.int32)
        return pa.table(
            {"prompt_ids": Ragged.from_rows(read, np.int32).to_column(), "response_ids": behind.to_column()}
        )

    def _ids(self, row: dict[str, Any]) -> list[int]:
        if self._reader is None:
            return [*row["prompt_ids"], *row["response_ids"]]
        answer = {"role": "assistant", "content": decode(self._reader, row["response_ids"])}
        text = self._writer.apply_chat_template([*json.loads(row["prompt"]), answer], tokenize=False)
        return self._writer(text, add_special_tokens=False)["input_ids"]

    def _without_padding(self, ids: Sequence[int]) -> Sequence[int]:
        length = len(ids)
        while length > 1 and ids[length - 1] == self._pad:
            length -= 1
        return ids[:length]


def _tokenizer_of(path: str, trust_remote_code: bool, needed: bool) -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(path, trust_remote_code)
    except UserError:
        if needed:
            raise
        return None
