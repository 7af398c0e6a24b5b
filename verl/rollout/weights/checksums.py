"""Checksums of tensors that are equal exactly when their bits are, and that add up over slices.

The checksum of a tensor is the sum, modulo 2^64, of bits(i) * weight(i) over its elements, where i is an element's
place in the whole tensor and weight(i) an odd number below 2^31 hashed from it. So ranks that hold slices sum what
they hold, and the sums of the slices add up to that of the whole tensor. A change of one element always changes it
(the product of an odd number and a difference below 2^32 is not 0 modulo 2^64); of many, with probability 1 - 2^-30
or better unless made on purpose.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from verl.rollout.weights.buckets import dtype_name

# Elements hashed at a time: bounds the extra memory to about 8 int64 tensors of this many.
CHUNK = 1 << 22

_MASK_31, _MASK_32 = (1 << 31) - 1, (1 << 32) - 1
_INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Piece:
    """What a rank holds of a named tensor: ``size`` rows of dimension ``dim``, from ``start`` on.

    shape: of the whole tensor. dtype: as torch prints it, without "torch.".
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    start: int
    size: int
    dtype: str
    checksum: int


def piece_of(name: str, held: torch.Tensor, shape: Sequence[int], dim: int = 0, start: int = 0) -> Piece:
    """held: the slice, any device; its shape is ``shape`` except in ``dim``."""
    size = held.shape[dim] if held.dim() else 1
    return Piece(name, tuple(shape), dim, start, size, dtype_name(held.dtype), checksum(held, shape, dim, start))


@torch.no_grad()
def checksum(held: torch.Tensor, shape: Sequence[int], dim: int = 0, start: int = 0) -> int:
    """In [0, 2^64). ``held`` is rows start, start + 1, ... of dimension ``dim`` of a tensor of ``shape``."""
    if not held.numel():
        return 0
    if not held.dim():
        held, shape = held[None], (1,)
    if held.element_size() == 8:  # as two halves each
        held, last = held.contiguous().view(torch.int32), len(shape) - 1
        start, shape = start * 2 if dim == last else start, (*shape[:-1], 2 * shape[-1])
    inner = math.prod(shape[dim + 1 :])  # elements of one row of dim
    rows = held.contiguous().view(_INT_OF_SIZE[held.element_size()]).view(-1, held.shape[dim] * inner)
    total = 0
    stride = shape[dim] * inner
    step_rows = max(1, CHUNK // max(rows.shape[1], 1))
    step_columns = min(rows.shape[1], CHUNK) or 1
    for first in range(0, rows.shape[0], step_rows):
        outer = torch.arange(first, min(first + step_rows, rows.shape[0]), device=held.device)[:, None] * stride
        for column in range(0, rows.shape[1], step_columns):
            bits = rows[first : first + step_rows, column : column + step_columns].to(torch.int64) & _MASK_32
            columns = torch.arange(column, column + bits.shape[1], device=held.device) + start * inner
            total += int((bits * _weights(outer + columns)).sum())
    return total % (1 << 64)


def _weights(places: torch.Tensor) -> torch.Tensor:
    """Odd numbers below 2^31, int64; no product here exceeds 2^63."""
    mixed = ((places & _MASK_31) * 0x9E3779B1 + (places >> 31)) & _MASK_32
    mixed = ((mixed ^ (mixed >> 15)) & _MASK_31) * 0x85EBCA77 & _MASK_32
    return ((mixed ^ (mixed >> 13)) & _MASK_31) | 1


def differences(expected: Iterable[tuple[str, torch.Tensor]], ranks: Sequence[Sequence[Piece]]) -> list[str]:
    """One line for each tensor that the ranks do not hold as it is expected, naming it.

    expected: whole tensors, one pass over them; cast to the type that is held before they are compared.
    ranks: the pieces of each rank, a tensor's slices or copies of them.
    """
    held: dict[str, list[tuple[int, Piece]]] = defaultdict(list)
    for rank, pieces in enumerate(ranks):
        for piece in pieces:
            held[piece.name].append((rank, piece))
    found = []
    for name, tensor in expected:
        parts = held.pop(name, None)
        problem = "is not held by the engine" if parts is None else _difference(tensor, parts)
        if problem:
            found.append(f"{name} {problem}")
    return found + [f"{name} is held by the engine only" for name in held]


def _difference(expected: torch.Tensor, pieces: list[tuple[int, Piece]]) -> str | None:
    first = pieces[0][1]
    if tuple(expected.shape) != first.shape:
        return f"has shape {list(first.shape)}, not {list(expected.shape)}"
    distinct: dict[tuple[int, int, int], tuple[int, Piece]] = {}
    for rank, piece in pieces:
        other_rank, other = distinct.setdefault((piece.dim, piece.start, piece.size), (rank, piece))
        if other.checksum != piece.checksum:
            return f"differs between the engine's ranks {other_rank} and {rank}, which hold the same part of it"
    if sum(size for _, _, size in distinct) != (first.shape[first.dim] if first.shape else 1):
        return "is held in parts that do not add up to the whole"
    held = sum(piece.checksum for _, piece in distinct.values()) % (1 << 64)
    wanted = checksum(expected.to(getattr(torch, first.dtype)), first.shape)
    return None if held == wanted else f"differs (checksum {held:016x}, the trainer's {wanted:016x})"
