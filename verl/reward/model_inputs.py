"""What a reward model reads: each row's prompt and response, as token ids of its own tokenizer if it differs."""

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
    """tokenizer: the policy's. pad_token_id: of the reward model's config; as transformers has it, the score is that of
    the last token that is another one.

    With ``input_tokenizer`` responses are decoded by it, and the conversation goes through the chat template of the
    reward model's own tokenizer. Else token ids stay as they are, which takes the same tokenizer: UserError if not.
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
                    f"{KEY}.path={model.path}: its tokenizer has no chat template to put conversations into"
                )
            self._reader, self._writer = load_tokenizer(model.input_tokenizer, trust), own
        elif own is not None and own.get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"{KEY}.path={model.path} has another vocabulary than the policy's tokenizer. Set "
                f"{KEY}.input_tokenizer to the policy's, and responses are tokenised again for the reward model."
            )

    def __call__(self, table: pa.Table) -> pa.Table:
        """The rows as the training engine takes them for values: prompt_ids is all that the model reads, response_ids
        one token behind it, which is never looked at and whose value is that of the last token read."""
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
