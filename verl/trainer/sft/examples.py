"""Training examples (prompt and response) as the token columns that an engine trains on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from verl.config.sections.models import SFTDataConfig
from verl.data.ragged import Ragged
from verl.data.schema import FLAGS, IDS
from verl.data.tokenizer import encode_chats
from verl.errors import UserError

SCHEMA = pa.schema([("prompt_ids", IDS), ("response_ids", IDS), ("response_mask", FLAGS)])


def load_examples(
    files: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: SFTDataConfig,
    *,
    kind: Literal["train", "val"],
    notice: Callable[[str], None],
) -> pa.Table:
    """One row per example in the files' order, with the columns of ``SCHEMA``.

    The prompt (chat messages in ``config.prompt_key``) is tokenised as in generation. The response (text in
    ``config.response_key``) is tokenised by itself and followed by the tokenizer's end token. Examples longer than
    ``config.max_length`` tokens are cut as ``config.truncation`` says; see ``fitted``.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end token: set eos_token in its tokenizer_config.json")
    pairs = [pair for file in files for pair in _read(file, config)]
    prompts = encode_chats(tokenizer, [prompt for prompt, _ in pairs], **config.apply_chat_template_kwargs)
    responses = tokenizer([response for _, response in pairs], add_special_tokens=False)["input_ids"] if pairs else []
    examples = [(p, [*r, tokenizer.eos_token_id]) for p, r in zip(prompts, responses, strict=True)]
    kept = _fit(examples, config, kind, notice)
    if not kept:
        raise UserError(f"data.{kind}_files: no example is left of {len(pairs)} rows")
    response_ids = Ragged.from_rows([np.array(response) for _, response in kept], np.int32)
    mask = response_ids.like(np.ones(len(response_ids.values), np.int8))
    prompt_ids = Ragged.from_rows([np.array(prompt) for prompt, _ in kept], np.int32)
    return pa.table([column.to_column() for column in (prompt_ids, response_ids, mask)], schema=SCHEMA)


def fitted(prompt: list[int], response: list[int], max_length: int, side: str) -> tuple[list[int], list[int]]:
    """At most ``max_length`` tokens in all. side: what is cut off: "left" the prompt's beginning, of which one token
    stays; "right" the response's end. A response with no room left comes back empty."""
    excess = max(len(prompt) + len(response) - max_length, 0)
    if side == "left":
        cut = min(excess, len(prompt) - 1)
        prompt, excess = prompt[cut:], excess - cut
    return prompt, response[: max(len(response) - excess, 0)]


def _fit(
    examples: list[tuple[list[int], list[int]]], config: SFTDataConfig, kind: str, notice: Callable[[str], None]
) -> list[tuple[list[int], list[int]]]:
    lengths = [len(prompt) + len(response) for prompt, response in examples]
    over = [row for row, length in enumerate(lengths) if length > config.max_length]
    if not over:
        return examples
    of_all = (
        f"{len(over)} of {len(examples)} examples of data.{kind}_files are over data.max_length={config.max_length}"
    )
    if config.truncation == "error":
        first = ", ".join(f"row {row}: {lengths[row]} tokens" for row in over[:5])
        raise UserError(
            f"{of_all} ({first}{', ...' if len(over) > 5 else ''}). Set data.max_length={max(lengths)} (the longest), "
            "or data.truncation=left or right to cut them."
        )
    cut = [fitted(*example, config.max_length, config.truncation) for example in examples]
    kept = [example for example in cut if example[1]]
    dropped = len(cut) - len(kept)
    notice(
        f"{of_all} and are cut (data.truncation={config.truncation})"
        + (f"; {dropped} of them have no room for a response and are left out" if dropped else "")
    )
    return kept


def _read(file: str, config: SFTDataConfig) -> list[tuple[list[dict], str]]:
    path, keys = Path(file).expanduser(), [config.prompt_key, config.response_key]
    try:
        table = pq.read_table(path, columns=keys)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from error
    pairs = list(zip(*(table[key].to_pylist() for key in keys), strict=True))
    for row, (prompt, response) in enumerate(pairs):
        is_chat = isinstance(prompt, list) and prompt and all({"role", "content"} <= set(m or ()) for m in prompt)
        if not is_chat:
            raise UserError(
                f"{path}, row {row}: column {config.prompt_key!r} (data.prompt_key) holds {str(prompt)[:80]!r}, "
                'not a list of chat messages such as [{"role": "user", "content": "..."}]'
            )
        if not isinstance(response, str):
            raise UserError(
                f"{path}, row {row}: column {config.response_key!r} (data.response_key) holds "
                f"{str(response)[:80]!r}, not text"
            )
    return pairs
