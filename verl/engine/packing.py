"""Where tables become tensors: rows are cut into micro-batches, and a micro-batch becomes the tensors of one forward.

The only place that knows how rows lie in a forward. Here: one row a sequence, padded on the right to the micro-batch's
longest. Causal attention never looks right, so no real token sees the padding and no attention mask is needed. A
response's last token is predicted but never an input, so a row takes ``prompt + response - 1`` positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from verl.data.ragged import Ragged
from verl.data.schema import ragged


@dataclass(frozen=True)
class Batching:
    """How a rank's rows are cut into micro-batches. None is no limit; where both are given, both hold.

    micro_batch_size: rows of a micro-batch.
    max_tokens: its tokens, padding counted: rows x (longest row's prompt and response). A single longer row goes alone.
    """

    micro_batch_size: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class MicroBatch:
    """B rows with T response tokens in all, in the padded layout.

    input_ids: int64, (B, L).
    positions: int64, (T,): for each response token, the place in the flattened (B * L) of the token before it, whose
        hidden state predicts it.
    targets: int64, (T,): the response tokens.
    tokens: int64 numpy, (T,): their places among all response tokens of the table.
    columns: the table's token columns, (T,) each: floats as float32, flags and ids as they are; and ``row_ids``,
        int64, the row of the table that each token belongs to.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    tokens: np.ndarray
    columns: dict[str, torch.Tensor]


class Packer:
    """A table's token columns, ready to be cut into micro-batches. Needs ``prompt_ids`` and ``response_ids``."""

    def __init__(self, table: pa.Table, device: torch.device):
        self.device = device
        self.prompts = ragged(table, "prompt_ids")
        self.responses = ragged(table, "response_ids")
        if len(self.prompts) and not self.prompts.lengths.all():
            row = int(np.flatnonzero(self.prompts.lengths == 0)[0])
            raise ValueError(f"row {row} has an empty prompt: nothing predicts its first response token")
        self.columns = _token_columns(table, self.responses)

    def micro_batches(self, batching: Batching) -> list[np.ndarray]:
        """Row indices of each micro-batch, longest rows first. Rows without a response are in none."""
        rows = np.flatnonzero(self.responses.lengths)
        lengths = self.prompts.lengths[rows] + self.responses.lengths[rows]
        longest_first = np.argsort(-lengths, kind="stable")
        return [rows[longest_first[cut]] for cut in _cuts(lengths[longest_first], batching)]

    def micro_batch(self, rows: np.ndarray) -> MicroBatch:
        prompt_lengths, response_lengths = self.prompts.lengths[rows], self.responses.lengths[rows]
        width = int((prompt_lengths + response_lengths).max()) - 1
        input_ids = np.zeros((len(rows), width), np.int64)
        for line, row in enumerate(rows):
            prompt, response = self.prompts[row], self.responses[row]
            input_ids[line, : len(prompt)] = prompt
            input_ids[line, len(prompt) : len(prompt) + len(response) - 1] = response[:-1]
        tokens = _ranges(self.responses.offsets[rows], response_lengths)
        columns = {name: self._tensor(values[tokens]) for name, values in self.columns.items()}
        columns["row_ids"] = self._tensor(np.repeat(rows, response_lengths))
        return MicroBatch(
            input_ids=self._tensor(input_ids),
            positions=self._tensor(_ranges(np.arange(len(rows)) * width + prompt_lengths - 1, response_lengths)),
            targets=self._tensor(self.responses.values[tokens].astype(np.int64)),
            tokens=tokens,
            columns=columns,
        )

    def filler(self) -> MicroBatch:
        """One token of nobody's: the forward (and backward, with zero loss) of a rank that has run out of rows."""
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        return MicroBatch(zero[None], zero, zero, np.empty(0, np.int64), {})

    def column(self, tokens: Sequence[np.ndarray], values: Sequence[torch.Tensor]) -> pa.ListArray:
        """float32 token column in the table's order from each micro-batch's ``tokens`` and values, shape (T,)."""
        flat = np.empty(len(self.responses.values), np.float32)
        flat[np.concatenate(tokens)] = torch.cat(list(values)).float().cpu().numpy()
        return self.responses.like(flat).to_column()

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)


def _token_columns(table: pa.Table, responses: Ragged) -> dict[str, np.ndarray]:
    columns = {}
    for field in table.schema:
        is_numbers = pa.types.is_list(field.type) and pa.types.is_primitive(field.type.value_type)
        if not is_numbers or field.name == "prompt_ids":
            continue
        column = ragged(table, field.name)
        if not np.array_equal(column.offsets, responses.offsets):
            raise ValueError(f"column {field.name!r} does not have one entry for each response token")
        columns[field.name] = column.values
    return columns


def _cuts(lengths: np.ndarray, batching: Batching) -> list[slice]:
    """Consecutive slices of rows that are sorted by length, longest first."""
    max_rows = batching.micro_batch_size or len(lengths)
    cuts, start = [], 0
    while start < len(lengths):
        size = max_rows
        if batching.max_tokens is not None:
            size = min(size, max(1, batching.max_tokens // int(lengths[start])))
        cuts.append(slice(start, start + size))
        start += size
    return cuts


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``concatenate([arange(start, start + length) ...])``, int64."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)
