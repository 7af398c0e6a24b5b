"""Checksums of tensors that are equal exactly when their bits are.

A tensor's bytes, row by row, are words of 32 bits (the last one filled up with zeros), and these are rows of ``WIDTH``.
The checksum is the sum, modulo 2^64, of word(i) * weight(column) * weight(FAR + row), of words with their sign and of
odd weights below 2^31 that are hashed from their places. A change of one word always changes it (the product of odd
numbers and a difference below 2^32 is not 0 modulo 2^64); of many, with probability 1 - 2^-26 or better unless made on
purpose. For each byte of a tensor 9 are read or written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch

from verl.rollout.weights.buckets import dtype_name

WIDTH = 1 << 16
# Rows hashed at a time: bounds the extra memory to an int64 tensor of so many (64 MiB).
ROWS = 1 << 7
FAR = 1 << 40  # no column is as far out

_MASK_31, _MASK_32 = (1 << 31) - 1, (1 << 32) - 1


@dataclass(frozen=True)
class Piece:
    """What a rank holds of a named tensor: ``size`` rows of dimension ``dim``, from ``start`` on.

    shape: of the whole tensor. dtype: as torch prints it, without "torch.". checksum: of the piece.
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
    return Piece(name, tuple(shape), dim, start, size, dtype_name(held.dtype), checksum(held))


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> int:
    """In [0, 2^64)."""
    if not tensor.numel():
        return 0
    words = _words(tensor)
    whole = len(words) // WIDTH
    columns = _columns(WIDTH, words.device)
    blocks = [*words[: whole * WIDTH].view(-1, WIDTH).split(ROWS), words[None, whole * WIDTH :]]
    sums = [block.to(torch.int64).mul_(columns[: block.shape[1]]).sum(1) for block in blocks if block.numel()]
    of_rows = torch.cat(sums).tolist()
    weights = _weights(torch.arange(len(of_rows)) + FAR).tolist()
    return sum(total * weight for total, weight in zip(of_rows, weights, strict=True)) % (1 << 64)


@cache
def _columns(width: int, device: torch.device) -> torch.Tensor:
    return _weights(torch.arange(width, device=device))


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """int32, of one dimension."""
    flat = tensor.contiguous().view(-1)
    if flat.data_ptr() % 4:
        flat = flat.clone()
    if odd := flat.nbytes % 4:
        filled = flat.new_zeros(flat.numel() + (4 - odd) // flat.element_size())
        filled[: flat.numel()] = flat
        flat = filled
    return flat.view(torch.uint8).view(torch.int32)


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
    if not _make_up(first.shape, sorted(distinct)):
        return "is held in parts that do not add up to the whole"
    whole = expected.to(getattr(torch, first.dtype))
    for _, piece in distinct.values():
        wanted = checksum(whole.narrow(piece.dim, piece.start, piece.size) if whole.dim() else whole)
        if piece.checksum != wanted:
            return f"differs (checksum {piece.checksum:016x}, the trainer's {wanted:016x})"
    return None


def _make_up(shape: Sequence[int], parts: Sequence[tuple[int, int, int]]) -> bool:
    """parts: (dimension, start, size) of each, sorted. Whether they follow one another along one dimension, from end to
    end."""
    if not shape:
        return True
    dims, starts, sizes = zip(*parts, strict=True)
    return len(set(dims)) == 1 and (*starts, shape[dims[0]]) == (0, *accumulate(sizes))
