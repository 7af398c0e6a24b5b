"""Examples to imitate: a prompt's chat messages and the response's text, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from verl.config.models import SFTDataConfig
from verl.data.ragged import Ragged
from verl.data.schema import with_columns
from verl.data.tokenizer import Message, encode_chats
from verl.errors import UserError


def load_examples(files: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: SFTDataConfig) -> pa.Table:
    """Columns prompt_ids, response_ids (the end token included) and response_mask (1 everywhere: it is trained on)."""
    columns = [config.prompt_key, config.response_key]
    table = pa.concat_tables([pq.read_table(Path(file).expanduser(), columns=columns) for file in files])
    prompts = table[config.prompt_key].to_pylist()
    responses = table[config.response_key].to_pylist()
    prompt_ids = encode_chats(tokenizer, prompts, **config.apply_chat_template_kwargs)
    response_ids = encode_responses(tokenizer, prompts, responses, config)
    rows = [fit(*pair, config, number) for number, pair in enumerate(zip(prompt_ids, response_ids, strict=True))]
    response = Ragged.from_rows([np.array(ids) for _, ids in rows], np.int32)
    table = pa.table({"row": np.arange(len(rows))})
    return with_columns(
        table,
        prompt_ids=Ragged.from_rows([np.array(ids) for ids, _ in rows], np.int32),
        response_ids=response,
        response_mask=response.like(np.ones(len(response.values), np.int8)),
    )


def encode_responses(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    responses: Sequence[str],
    config: SFTDataConfig,
) -> list[list[int]]:
    """What the chat template writes for the assistant's turn, up to its end token, which is added where it writes none.

    A tokenizer without a chat template: the response's own tokens and the end token.
    """
    texts = list(responses)
    if tokenizer.chat_template:
        template = {"tokenize": False, **config.apply_chat_template_kwargs}
        asked = tokenizer.apply_chat_template([list(p) for p in prompts], add_generation_prompt=True, **template)
        answers = [[*p, {"role": "assistant", "content": r}] for p, r in zip(prompts, responses, strict=True)]
        whole = tokenizer.apply_chat_template(answers, **template)
        for number, (start, text) in enumerate(zip(asked, whole, strict=True)):
            if not text.startswith(start):
                raise UserError(
                    f"the chat template writes the prompt of example {number} differently once it is answered, "
                    "so its response cannot be told apart: use a template that only adds to the conversation"
                )
            texts[number] = text[len(start) :]
    end = tokenizer.eos_token_id
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [ids[: ids.index(end) + 1] if end in ids else [*ids, end] for ids in encoded]


def fit(prompt: list[int], response: list[int], config: SFTDataConfig, number: int) -> tuple[list[int], list[int]]:
    """Cut to max_length as ``data.truncation`` says; the prompt keeps at least one token on the left-hand cut."""
    over = len(prompt) + len(response) - config.max_length
    if over <= 0:
        return prompt, response
    if config.truncation == "error":
        raise UserError(
            f"example {number} has {len(prompt) + len(response)} tokens, over data.max_length={config.max_length}: "
            "raise it, or cut long examples with data.truncation=left or right"
        )
    if config.truncation == "left" and over < len(prompt):
        return prompt[over:], response
    if config.truncation == "right" and over < len(response):
        return prompt, response[:-over]
    raise UserError(
        f"example {number}: cutting {over} tokens on the {config.truncation} would leave nothing of its "
        f"{'prompt' if config.truncation == 'left' else 'response'}: raise data.max_length"
    )
