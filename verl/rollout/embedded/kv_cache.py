"""Keys and values of the rows being decoded, and attention over them.

One forward carries, end to end in a single sequence without padding, one token of every row that is decoding and the
whole prompts of the rows just admitted:

    tokens    d d d d d p p p p p p p p p p p p p
              rows 0-4  row 5    row 6 and its copies 7, 8

A row is a slot of the cache; decoding rows are always slots 0..n-1. A transformers model meets the cache as its
``past_key_values`` and the attention as its ``attn_implementation``; both find what to do in the ``StepPlan`` that the
forward passes down.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig
from transformers.cache_utils import Cache

from verl.errors import UserError

ATTENTION = "verl_slots"

# Lengths, of the cache and of what decoding rows look at, are multiples of this.
SPAN_STEP = 32


@dataclass(frozen=True)
class Segment:
    """The prompt tokens ``start .. start + length`` of a forward, whose keys and values are in ``slot``."""

    slot: int
    start: int
    length: int


@dataclass(frozen=True)
class StepPlan:
    """What one forward does.

    positions: int64, shape (n,): where each decoding row's token goes in its slot (and in its text).
    segments: the prompts that follow, in order.
    longest: the length of the longest decoding row.
    slots, places: int64, shape (M,): the slots and the places in them to fill; sources: the tokens that fill them, None
        for all in order. M exceeds the tokens where a prompt goes to several slots.
    """

    positions: torch.Tensor
    longest: int
    segments: Sequence[Segment]
    slots: torch.Tensor
    places: torch.Tensor
    sources: torch.Tensor | None
    _biases: dict[Any, torch.Tensor] = field(default_factory=dict)
    _targets: dict[Any, torch.Tensor] = field(default_factory=dict)

    @property
    def span(self) -> int:
        """How far into their slots decoding rows look; the kernels like round numbers."""
        return -(-self.longest // SPAN_STEP) * SPAN_STEP

    def decode_bias(self, dtype: torch.dtype, window: int | None) -> torch.Tensor:
        """Shape (n, 1, 1, span): 0 on the tokens a decoding row sees, -inf elsewhere."""
        if (dtype, window) not in self._biases:
            columns = torch.arange(self.span, device=self.positions.device)
            hidden = columns > self.positions[:, None]
            if window is not None:
                hidden |= columns <= self.positions[:, None] - window
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
            self._biases[dtype, window] = bias[:, None, None, :]
        return self._biases[dtype, window]

    def targets(self, heads: int, length: int) -> torch.Tensor:
        """Shape (M * heads,): the rows of a flattened (slots, heads, length) storage to fill, by token, then head."""
        if (heads, length) not in self._targets:
            columns = torch.arange(heads, device=self.slots.device) * length
            first = self.slots * (heads * length) + self.places
            self._targets[heads, length] = (first[:, None] + columns).flatten()
        return self._targets[heads, length]


class SlotCache(Cache):
    """Keys and values of each layer, shape (slots, heads, length, head_dim), grown as needed, freed by ``clear``."""

    def __init__(self, max_slots: int, max_length: int):
        super().__init__(layers=[])
        self._max_slots, self._max_length = max_slots, max_length
        self.slots = self.length = 0
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self.plan: StepPlan | None = None

    def clear(self) -> None:
        self.slots = self.length = 0
        self._keys.clear()
        self._values.clear()

    def reserve(self, slots: int, length: int) -> None:
        """Room for so many slots of such a length: at least a half more than before when it must grow."""
        if slots > self.slots:
            self.slots = min(self._max_slots, max(slots, self.slots * 3 // 2))
        if length > self.length:
            wanted = max(length, self.length * 3 // 2)
            self.length = -(-min(wanted, self._max_length) // SPAN_STEP) * SPAN_STEP
        for stored in (self._keys, self._values):
            for layer, old in stored.items():
                slots, heads, length, dim = old.shape
                if (slots, length) != (self.slots, self.length):
                    stored[layer] = old.new_zeros(self.slots, heads, self.length, dim)
                    stored[layer][:slots, :, :length] = old

    def copy(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy the first ``length`` tokens of some slots over others."""
        for stored in (*self._keys.values(), *self._values.values()):
            stored[targets, :, :length] = stored[sources, :, :length]

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):  # type: ignore[override]
        """Store this forward's keys and values, each (1, heads, tokens, head_dim); answers with the whole storage."""
        return (
            self._store(self._keys, layer_idx, key_states),
            self._store(self._values, layer_idx, value_states),
        )

    def _store(self, stored: dict[int, torch.Tensor], layer: int, states: torch.Tensor) -> torch.Tensor:
        plan = self.plan
        assert plan is not None
        _, heads, _, dim = states.shape
        if layer not in stored:  # zeros, as masked places still enter products
            stored[layer] = states.new_zeros(self.slots, heads, self.length, dim)
        tokens_THD = states[0].transpose(0, 1)
        if plan.sources is not None:
            tokens_THD = tokens_THD.index_select(0, plan.sources)
        stored[layer].view(-1, dim).index_copy_(0, plan.targets(heads, self.length), tokens_THD.reshape(-1, dim))
        return stored[layer]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are passed explicitly


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    slot_plan: StepPlan | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An ``attn_implementation``. query (1, heads, tokens, head_dim); key and value are a SlotCache's storage.

    Returns (1, tokens, heads, value_head_dim).
    """
    if slot_plan is None or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise UserError(
            f"the embedded engine cannot decode with {type(module).__name__} (it does not pass arguments on to its "
            "attention, or caps its attention logits); use rollout.name=sglang or vllm for this model"
        )
    query_THD = query[0].transpose(0, 1)
    outputs = []
    decoding = len(slot_plan.positions)
    if decoding:
        outputs.append(_decode(query_THD[:decoding], key, value, slot_plan, scaling, sliding_window))
    for segment in slot_plan.segments:
        outputs.append(_prefill(query_THD, key, value, segment, scaling, sliding_window))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


def _decode(
    query_nHD: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: StepPlan,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    rows, heads, dim = query_nHD.shape
    kv_heads = key.shape[1]
    # Query heads that share a key head stand where query positions usually do: no copy of keys for each of them.
    out = scaled_dot_product_attention(
        query_nHD.reshape(rows, kv_heads, heads // kv_heads, dim),
        key[:rows, :, : plan.span],
        value[:rows, :, : plan.span],
        attn_mask=plan.decode_bias(query_nHD.dtype, window),
        scale=scaling,
    )
    return out.reshape(rows, heads, -1)


def _prefill(
    query_THD: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segment: Segment,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    length = segment.length
    query = query_THD[segment.start : segment.start + length].transpose(0, 1)[None]
    mask = None
    if window is not None and length > window:
        distance = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
        mask = (distance >= 0) & (distance < window)
    out = scaled_dot_product_attention(
        query,
        key[segment.slot, :, :length][None],
        value[segment.slot, :, :length][None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[0].transpose(0, 1)


AttentionInterface.register(ATTENTION, slot_attention)


@contextmanager
def slots_attending(config: PretrainedConfig) -> Iterator[None]:
    """Within this, models of this config attend through a SlotCache."""
    trainers = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = trainers
