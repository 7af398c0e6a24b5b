"""Turns tables into tensors: cuts rows into micro-batches, and makes each micro-batch the tensors of one forward.

Only this module knows how sequences lie in a forward:

- Padded: one row per sequence, padded on the right to the longest of the micro-batch. Causal attention never looks to
  the right, so no real token sees the padding and no attention mask is needed.
- Packed: all sequences end to end in one row. Attention gets the boundaries (``verl.engine.attention``).

The last token of a response is predicted but is never an input, so a sequence takes ``prompt + response - 1``
positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from verl.data.ragged import Ragged
from verl.data.schema import ragged
from verl.plan import MicroBatching

# The length of the longest packed sequence is rounded up to a multiple of this. The kernel needs only a bound, and few
# distinct values mean few compiled variants.
LENGTH_STEP = 256
# Fixed cost of a padded forward, with or without backward, in tokens.
# CPU: slope of CPU time over the number of forwards for rows of 32 tokens (1 to 32 forwards, one thread). Measured: 60
#   to 110 tokens for 0.76 M parameters, 40 for 8 M, 25 for 34 M.
# CUDA: 8,800 for 0.5B (log-probs on an H100, when kernel launches took longer); about 1,500 for 1.5B (the same tokens
#   in 4 and in 2 packed micro-batches).
# If the value is off by a factor of two, a cut costs 5 % too much.
FORWARD_TOKENS = {"cpu": 64, "cuda": 2048}


@dataclass(frozen=True)
class MicroBatch:
    """The tensors of one forward, over rows with T response tokens in all.

    input_ids: int64, (B, L); B is 1 when packed.
    positions: int64, (T,). For each response token, the index in the flattened (B * L) of the token before it, whose
        hidden state predicts it.
    targets: int64, (T,): the response tokens.
    tokens: int64 numpy, (T,): their indices among all response tokens of the table.
    columns: the table's token columns, (T,) each. Floats are float32; flags and ids keep their dtype. ``row_ids``
        (int64) is the row of the table that each token belongs to.
    layout: further arguments of a model's forward, under transformers' names. Empty when padded. When packed:
        position_ids: int64 (1, L), from 0 in each sequence.
        cu_seq_lens_q, cu_seq_lens_k: int32 (N + 1,), the boundaries of the N sequences.
        max_length_q, max_length_k: the longest sequence, rounded up.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    tokens: np.ndarray
    columns: dict[str, torch.Tensor]
    layout: dict[str, Any] = dataclasses.field(default_factory=dict)


class Packer:
    """Cuts a table with the columns ``prompt_ids`` and ``response_ids`` into micro-batches."""

    def __init__(self, table: pa.Table, device: torch.device, packed: bool = False):
        self.device, self.packed = device, packed
        self.prompts = ragged(table, "prompt_ids")
        self.responses = ragged(table, "response_ids")
        if len(self.prompts) and not self.prompts.lengths.all():
            row = int(np.flatnonzero(self.prompts.lengths == 0)[0])
            raise ValueError(f"row {row} has an empty prompt: nothing predicts its first response token")
        self.columns = _token_columns(table, self.responses)

    def micro_batches(self, batching: MicroBatching) -> list[np.ndarray]:
        """Row indices of each micro-batch, longest rows first. Rows without a response are left out."""
        rows = np.flatnonzero(self.responses.lengths)
        lengths = self.prompts.lengths[rows] + self.responses.lengths[rows]
        longest_first = np.argsort(-lengths, kind="stable")
        rows, lengths = rows[longest_first], lengths[longest_first]
        if self.packed:
            return [rows[each] for each in _bins(lengths, batching)]
        return [rows[cut] for cut in _cuts(lengths, batching, FORWARD_TOKENS[self.device.type])]

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """(input tokens, response tokens) of each row with a response, int64 (R,) each."""
        rows = np.flatnonzero(self.responses.lengths)
        responses = self.responses.lengths[rows]
        return self.prompts.lengths[rows] + responses - 1, responses

    def micro_batch(self, rows: np.ndarray) -> MicroBatch:
        prompt_lengths, response_lengths = self.prompts.lengths[rows], self.responses.lengths[rows]
        lengths = prompt_lengths + response_lengths - 1
        starts = np.cumsum(lengths) - lengths if self.packed else np.arange(len(rows)) * lengths.max()
        input_ids = np.zeros(lengths.sum() if self.packed else len(rows) * lengths.max(), np.int64)
        input_ids[_ranges(starts, prompt_lengths)] = self.prompts.values[
            _ranges(self.prompts.offsets[rows], prompt_lengths)
        ]
        input_ids[_ranges(starts + prompt_lengths, response_lengths - 1)] = self.responses.values[
            _ranges(self.responses.offsets[rows], response_lengths - 1)
        ]
        tokens = _ranges(self.responses.offsets[rows], response_lengths)
        columns = {name: self._tensor(values[tokens]) for name, values in self.columns.items()}
        columns["row_ids"] = self._tensor(np.repeat(rows, response_lengths))
        return MicroBatch(
            input_ids=self._tensor(input_ids.reshape(1 if self.packed else len(rows), -1)),
            positions=self._tensor(_ranges(starts + prompt_lengths - 1, response_lengths)),
            targets=self._tensor(self.responses.values[tokens].astype(np.int64)),
            tokens=tokens,
            columns=columns,
            layout=self._layout(lengths) if self.packed else {},
        )

    def filler(self) -> MicroBatch:
        """Two dummy tokens, for a rank that has no rows left while others still run forwards. Its loss is zero."""
        zeros = torch.zeros(2, dtype=torch.int64, device=self.device)
        layout = self._layout(np.array([2])) if self.packed else {}
        return MicroBatch(zeros[None], zeros[:1], zeros[:1], np.empty(0, np.int64), {}, layout)

    def _layout(self, lengths: np.ndarray) -> dict[str, Any]:
        ends = self._tensor(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        longest = -(-int(lengths.max()) // LENGTH_STEP) * LENGTH_STEP
        return {
            "position_ids": self._tensor(_ranges(np.zeros_like(lengths), lengths)[None]),
            **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), ends),
            **dict.fromkeys(("max_length_q", "max_length_k"), longest),
        }

    def column(self, tokens: Sequence[np.ndarray], values: Sequence[torch.Tensor]) -> pa.ListArray:
        """A float32 token column in the table's order.

        tokens: ``MicroBatch.tokens`` of each micro-batch.
        values: its values, (T,) each.
        """
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


def _cuts(lengths: np.ndarray, batching: MicroBatching, forward_tokens: int) -> list[slice]:
    """The cheapest consecutive slices of rows that are sorted by length, longest first.

    A slice costs its tokens, padding included, plus ``forward_tokens``. If two cuts cost the same, the one whose first
    slices are larger wins. Rows in another order cannot cost less: sorting the rows over slices of the same sizes makes
    no slice longer.

    Without a token limit tokens cost nothing. Then the fewest slices win, each but the last of ``micro_batch_size``
    rows.
    """
    count = len(lengths)
    most, price = np.full(count, batching.micro_batch_size or count), np.zeros(count, np.int64)
    if batching.max_tokens is not None:
        most, price = np.minimum(most, np.maximum(batching.max_tokens // lengths, 1)), lengths
    costs, ends = (
        np.zeros(count + 1, np.int64),
        np.zeros(count, np.int64),
    )  # of each row: cost from it on, end of its slice
    for start in reversed(range(count)):
        stops = np.arange(min(start + most[start], count), start, -1)
        cost = forward_tokens + (stops - start) * price[start] + costs[stops]
        best = cost.argmin()
        costs[start], ends[start] = cost[best], stops[best]
    cuts, start = [], 0
    while start < count:
        cuts.append(slice(start, int(ends[start])))
        start = cuts[-1].stop
    return cuts


def _bins(lengths: np.ndarray, batching: MicroBatching) -> list[list[int]]:
    """Row indices of each micro-batch by first-fit decreasing: each row, longest first, goes to the first micro-batch
    that has room for it."""
    max_rows = batching.micro_batch_size or len(lengths)
    bins: list[list[int]] = []
    room = np.zeros(len(lengths), np.int64)  # tokens that still fit into each micro-batch; 0 if it has max_rows
    for row, length in enumerate(lengths):
        fits = np.flatnonzero(room[: len(bins)] >= length)
        if len(fits):
            number = int(fits[0])
        else:
            number = len(bins)
            bins.append([])
            room[number] = max(length, np.iinfo(np.int64).max if batching.max_tokens is None else batching.max_tokens)
        bins[number].append(row)
        room[number] = 0 if len(bins[number]) == max_rows else room[number] - length
    return bins


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``concatenate([arange(start, start + length) ...])``, int64."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)
