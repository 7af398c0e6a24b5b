"""Attention over packed rows: sequences lie end to end in one row, and none attends to another.

On a GPU it is torch's ``varlen_attn``, in 16-bit dtypes. On a CPU it runs one sequence at a time, as a reference for
tests.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch.nn.attention.varlen import varlen_attn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

NAME = "verl_packed"
OWN = ("sdpa",)  # attn_implementation that this module replaces for packed rows
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
WINDOW_IN_MASK = ("qwen2_moe", "phimoe", "doge")
NATIVE = ("flash_attention_2", "flash_attention_3")  # these take packed rows themselves


def why_padded(hf: transformers.PreTrainedModel, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why sequences of this model cannot be packed; None if they can."""
    config = hf.config
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return f"attention over packed rows needs a GPU and a 16-bit type, not {device.type} and {dtype}"
    if config._attn_implementation not in OWN + NATIVE:
        return f"attn_implementation={config._attn_implementation} does not take packed rows"
    if not hf._supports_attention_backend:
        return f"{config.model_type} has an attention of its own in transformers"
    if getattr(config, "attn_logit_softcapping", None) or getattr(config, "kv_lora_rank", None):
        return f"{config.model_type} caps attention logits, or attends over latents"
    if config.model_type in WINDOW_IN_MASK and getattr(config, "sliding_window", None):
        return f"{config.model_type} tells of its sliding window in attention's mask alone"
    layers = set(getattr(config, "layer_types", None) or ())
    if hf._is_stateful or layers - {"full_attention", "sliding_attention"}:
        return f"{config.model_type} has layers that are not attention over all tokens, or over a sliding window"
    return None


@contextmanager
def packed_attention(hf: transformers.PreTrainedModel) -> Iterator[None]:
    """Forwards inside take packed rows. Enclose backwards too: activation checkpointing may run layers again."""
    given = hf.config._attn_implementation
    if given in OWN:
        hf.config._attn_implementation = NAME
    try:
        yield
    finally:
        hf.config._attn_implementation = given


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Output (1, L, heads, D) of attention, with the signature of transformers' attention functions.

    query: (1, heads, L, D).
    key, value: (1, key heads, L, D).
    cu_seq_lens_q: int32 (N + 1,), the boundaries of the sequences.
    """
    # Flash attention's window counts the tokens to the left of a query; transformers' window includes the query.
    window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
    of = _on_gpu if query.is_cuda else _one_by_one
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    return of(q, k, v, cu_seq_lens_q, max_length_q, scaling, window)[None], None


def _on_gpu(q, k, v, ends, longest, scale, window):
    return varlen_attn(q, k, v, ends, ends, longest, longest, scale=scale, window_size=window, **_GROUPED)


def _one_by_one(q, k, v, ends, longest, scale, window):
    lengths = ends.diff().tolist()
    return torch.cat(
        [
            torch.nn.functional.scaled_dot_product_attention(
                *(each.transpose(0, 1)[None] for each in one), attn_mask=_mask(len(one[0]), window[0]), scale=scale,
                enable_gqa=True,
            )[0].transpose(0, 1)
            for one in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        ]
    )  # fmt: skip


def _mask(length: int, window: int) -> torch.Tensor:
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return causal if window < 0 else causal.triu(-window)


transformers.AttentionInterface.register(NAME, attend)
assert NAME not in ALL_MASK_ATTENTION_FUNCTIONS  # so transformers builds no mask for it
