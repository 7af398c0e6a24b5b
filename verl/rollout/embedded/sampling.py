"""Drawing tokens: pure functions of logits, sampling parameters and (seed, position), the same in any batch.

A token is the winner of an exponential race: token v arrives at time E_v / p_v, where p is the softmax and E_v is
exponential noise that depends on nothing but (seed, position, v); the first to arrive is v with probability p_v. In
logarithms this is the Gumbel-max trick. Rounding of the logits, which differs between batch sizes, moves arrival
times by about 1e-6 relative, so that a drawn token changes with the batch only where two of them are that close.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from verl.rollout.contract.base import SamplingParams

# Rows are drawn in pieces of about this many logits: bounds the memory of large vocabularies and stays in cache.
_PIECE = 1 << 19

# As many of the most probable tokens are sorted in search of a nucleus before all are.
_NUCLEUS = 1024

_U64 = np.uint64


@dataclass(frozen=True)
class SamplingRows:
    """The sampling parameters of B rows, as arrays of shape (B,).

    temperature: float32, 0 for greedy. top_k: int64, -1 for off. top_p, min_p: float32. seeds: uint64.
    min_new_tokens: int64, how many tokens must come before a stop token may.
    """

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    seeds: np.ndarray
    min_new_tokens: np.ndarray

    @classmethod
    def of(cls, params: Sequence[SamplingParams]) -> SamplingRows:
        return cls(
            np.array([p.temperature for p in params], np.float32),
            np.array([p.top_k for p in params], np.int64),
            np.array([p.top_p for p in params], np.float32),
            np.array([p.min_p for p in params], np.float32),
            np.array([p.seed % 2**64 for p in params], np.uint64),
            np.array([p.min_new_tokens for p in params], np.int64),
        )

    def __getitem__(self, rows: slice) -> SamplingRows:
        return SamplingRows(*(getattr(self, each.name)[rows] for each in fields(self)))


def sample_tokens(
    logits_BV: torch.Tensor,
    rows: SamplingRows,
    positions: np.ndarray,
    banned: Sequence[tuple[int, Sequence[int]]] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row, and its log-prob.

    positions: int64, shape (B,): how many tokens of the response came before. banned: (row, token ids never drawn).
    Returns tokens (int64) and log-probs (float32), both of shape (B,). A log-prob is of
    ``softmax(logits / temperature)`` over the whole vocabulary, whatever was banned or filtered out; of temperature 1
    for greedy rows. Greedy rows take the lowest id among equals.
    """
    count, vocabulary = logits_BV.shape
    step = max(1, _PIECE // vocabulary)
    pieces = [
        _draw_piece(
            logits_BV[start : start + step].float(),
            rows[start : start + step],
            positions[start : start + step],
            [(row - start, ids) for row, ids in banned if start <= row < start + step],
        )
        for start in range(0, count, step)
    ]
    tokens, log_probs = zip(*pieces, strict=True)
    return torch.cat(tokens), torch.cat(log_probs)


def _draw_piece(
    logits_BV: torch.Tensor, rows: SamplingRows, positions: np.ndarray, banned: list[tuple[int, Sequence[int]]]
) -> tuple[torch.Tensor, torch.Tensor]:
    device = logits_BV.device
    greedy = rows.temperature == 0
    scaled_BV = logits_BV
    if (rows.temperature[~greedy] != 1).any():
        scaled_BV = logits_BV / _column(np.where(greedy, 1, rows.temperature), device)

    candidates_BV = scaled_BV
    if banned:
        candidates_BV = scaled_BV.clone()
        for row, ids in banned:
            candidates_BV[row, list(ids)] = -torch.inf

    top_B1 = candidates_BV.amax(-1, keepdim=True)
    odds_BV = (candidates_BV - top_B1).exp_()  # the probabilities, up to each row's constant
    normaliser_B1 = top_B1 + odds_BV.sum(-1, keepdim=True).log_()
    if banned:
        normaliser_B1 = scaled_BV.logsumexp(-1, keepdim=True)

    if greedy.all():
        tokens_B1 = candidates_BV.argmax(-1, keepdim=True)
    else:
        if _filters(rows, logits_BV.shape[-1]):
            odds_BV.masked_fill_(candidates_BV < filter_floor(candidates_BV, rows), 0)
        noise_BV = exponential_noise(row_keys(rows.seeds, positions), logits_BV.shape[-1], device)
        tokens_B1 = odds_BV.div_(noise_BV).argmax(-1, keepdim=True)
        if greedy.any():
            tokens_B1 = torch.where(_column(greedy, device), candidates_BV.argmax(-1, keepdim=True), tokens_B1)
    log_probs_B1 = scaled_BV.gather(-1, tokens_B1) - normaliser_B1
    return tokens_B1[:, 0], log_probs_B1[:, 0]


def _column(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)[:, None]


# --- top_k, top_p, min_p ---------------------------------------------------------------------------------------------


def _filters(rows: SamplingRows, vocabulary: int) -> bool:
    return bool(((rows.min_p > 0) | _sorting(rows, vocabulary)).any())


def _sorting(rows: SamplingRows, vocabulary: int) -> np.ndarray:
    return ((rows.top_k > 0) & (rows.top_k < vocabulary)) | (rows.top_p < 1)


def filter_floor(scaled_BV: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """The logit below which a row's tokens are not drawn, shape (B, 1).

    Each filter works on what the one before it left, renormalised, in the order top_k, top_p, min_p. Tokens as
    probable as the last one kept are kept too.
    """
    floor_B1 = torch.full_like(scaled_BV[:, :1], -torch.inf)
    sorting = np.flatnonzero(_sorting(rows, scaled_BV.shape[-1]))
    if len(sorting):
        index = torch.from_numpy(sorting).to(scaled_BV.device)
        floor_B1[index] = _top_floor(scaled_BV[index], rows.top_k[sorting], rows.top_p[sorting])
    if (rows.min_p > 0).any():
        floor_B1 = floor_B1.maximum(scaled_BV.amax(-1, keepdim=True) + _column(rows.min_p, scaled_BV.device).log())
    return floor_B1


def _top_floor(scaled_BV: torch.Tensor, top_k: np.ndarray, top_p: np.ndarray) -> torch.Tensor:
    """The least logit that top_k and then top_p keep, shape (B, 1)."""
    vocabulary = scaled_BV.shape[-1]
    # A nucleus is rarely large, and sorting the whole vocabulary is dear.
    floor_B1, certain = _top_floor_among(scaled_BV, top_k, top_p, min(vocabulary, max(_NUCLEUS, int(top_k.max()))))
    return floor_B1 if certain else _top_floor_among(scaled_BV, top_k, top_p, vocabulary)[0]


def _top_floor_among(
    scaled_BV: torch.Tensor, top_k: np.ndarray, top_p: np.ndarray, width: int
) -> tuple[torch.Tensor, bool]:
    """``_top_floor`` among the ``width`` most probable tokens, and whether no row's may lie below them."""
    device, vocabulary = scaled_BV.device, scaled_BV.shape[-1]
    sorted_BW = scaled_BV.topk(width).values  # descending
    kept_B1 = _column(np.where(top_k > 0, np.minimum(top_k, vocabulary), vocabulary), device)
    chosen_BW = sorted_BW.masked_fill(torch.arange(width, device=device) >= kept_B1, -torch.inf)
    deeper_B1 = kept_B1 > width
    total_B1 = torch.where(deeper_B1, scaled_BV.logsumexp(-1, keepdim=True), chosen_BW.logsumexp(-1, keepdim=True))
    probs_BW = (chosen_BW - total_B1).exp()
    before_BW = probs_BW.cumsum(-1) - probs_BW  # the probability of all better tokens
    mass_B1 = _column(np.where(top_p < 1, top_p, np.inf).astype(np.float32), device)
    nucleus_B1 = (before_BW < mass_B1).sum(-1, keepdim=True).minimum(kept_B1)
    certain = width == vocabulary or not bool((deeper_B1 & (nucleus_B1 == width)).any())
    return sorted_BW.gather(-1, nucleus_B1 - 1), certain


# --- noise -----------------------------------------------------------------------------------------------------------


def row_keys(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """64 mixed bits for each (seed, position) as two int32, shape (B, 2)."""
    mixed = _mix64(_mix64(seeds.astype(_U64)) + positions.astype(_U64) * _U64(0xD1342543DE82EF95))
    return mixed.view(np.int32).reshape(-1, 2)


def _mix64(x: np.ndarray) -> np.ndarray:
    """The output function of splitmix64 (Steele, Lea, Flood 2014): a bijection in which every bit depends on all."""
    x = x + _U64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


def exponential_noise(keys: np.ndarray, vocabulary: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Exponential(1) noise, float32, shape (B, V), in [2.3e-10, 16.7]: a function of the row's key and the token id.

    A 32-bit multiply-xorshift hash of the token id, with half of the row's key added before its first round and half
    before its second. Torch shifts int32 arithmetically, hence the masks.
    """
    keys_B2 = torch.from_numpy(keys).to(device)
    bits_BV = torch.arange(vocabulary, dtype=torch.int32, device=device).mul_(-0x61C88647) + keys_B2[:, :1]
    bits_BV ^= (bits_BV >> 16).bitwise_and_(0xFFFF)
    bits_BV *= 0x7FEB352D
    bits_BV ^= keys_B2[:, 1:]
    bits_BV ^= (bits_BV >> 15).bitwise_and_(0x1FFFF)
    bits_BV *= -0x7B935975
    bits_BV ^= (bits_BV >> 16).bitwise_and_(0xFFFF)
    # |bits| / 2^31 is uniform and finest near 0, where the winners of the race are.
    uniform_BV = bits_BV.float().abs_().add_(0.5).mul_(-(2.0**-31)).clamp_(min=-1 + 2.0**-24)
    return uniform_BV.log1p_().neg_()
