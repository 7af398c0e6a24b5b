"""The decode loop of the embedded engine, one step at a time: rows in, finished rows out. Knows nothing of asyncio."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from verl.errors import UserError
from verl.rollout.contract.base import FinishReason
from verl.rollout.contract.sequence import TokenSequence
from verl.rollout.embedded.kv_cache import Segment, SlotCache, StepPlan
from verl.rollout.embedded.sampling import SamplingRows, sample_tokens


@dataclass(frozen=True)
class Admission:
    """Rows that a step lets in, and how they get the keys and values of their text.

    twins: (row, slot of a row with the same prompt, from which it copies). groups: rows of one text, computed once.
    """

    twins: list[tuple[TokenSequence, int]]
    groups: list[list[TokenSequence]]

    def rows(self) -> list[TokenSequence]:
        return [row for row, _ in self.twins] + [row for group in self.groups for row in group]


class Decoder:
    """Up to ``max_num_seqs`` rows in the slots of a cache; slot = index in ``rows``.

    forward: the forward of a transformers causal LM whose attention is ``slot_attention``, answering with its logits.
    max_prefill_tokens: prompt tokens that one step may compute (one prompt at least).
    """

    def __init__(
        self,
        forward: Callable[..., torch.Tensor],
        max_num_seqs: int,
        max_model_len: int,
        max_prefill_tokens: int,
    ):
        self._forward = forward
        self._max_num_seqs, self._max_prefill_tokens = max_num_seqs, max_prefill_tokens
        self._cache = SlotCache(max_num_seqs, max_model_len)
        self.rows: list[TokenSequence] = []
        self._sampling: SamplingRows | None = None  # of self.rows; None after any change

    @torch.no_grad()
    def step(
        self, waiting: deque[TokenSequence], version: int, device: torch.device
    ) -> list[tuple[TokenSequence, FinishReason]]:
        """Admit what there is room for, draw one token for every row, and give up the rows that this ended."""
        admission = self._admit(waiting)
        admitted = admission.rows()
        for _ in admitted:
            waiting.popleft()
        if admitted:
            self.rows = self.rows + admitted
            self._sampling = None
        tokens, log_probs = self._sample(self._logits(admission, device))
        reasons = [
            row.take(token, log_prob, version)
            for row, token, log_prob in zip(self.rows, tokens.tolist(), log_probs.tolist(), strict=True)
        ]
        ended = [(row, reason) for row, reason in zip(self.rows, reasons, strict=True) if reason]
        if ended:
            self.remove({row for row, _ in ended})
        return ended

    def remove(self, leaving: Collection[TokenSequence]) -> None:
        """Give up these rows; the last rows move into their slots, so that what is gone costs nothing."""
        kept = sum(row not in leaving for row in self.rows)
        if kept == len(self.rows):
            return
        holes = [slot for slot, row in enumerate(self.rows[:kept]) if row in leaving]
        movers = [slot for slot, row in enumerate(self.rows) if slot >= kept and row not in leaving]
        if movers:
            self._cache.copy(movers, holes, max(self.rows[slot].length for slot in movers))
        for hole, mover in zip(holes, movers, strict=True):
            self.rows[hole] = self.rows[mover]
        del self.rows[kept:]
        self._sampling = None

    def clear(self) -> list[TokenSequence]:
        """Free the cache and give up all rows, which are returned; admitted again, they go on where they were."""
        rows, self.rows, self._sampling = self.rows, [], None
        self._cache.clear()
        return rows

    def _admit(self, waiting: deque[TokenSequence]) -> Admission:
        """The rows at the head of the queue for which there are slots, within the prefill budget."""
        admission = Admission([], [])
        free = self._max_num_seqs - len(self.rows)
        if not free or not waiting:
            return admission
        slots = {row.prompt_key: slot for slot, row in enumerate(self.rows)}
        groups: dict[tuple[bytes, tuple[int, ...]], list[TokenSequence]] = {}
        tokens = 0
        for row, _ in zip(waiting, range(free), strict=False):
            if not row.ids and row.prompt_key in slots:
                admission.twins.append((row, slots[row.prompt_key]))
                continue
            text = (row.prompt_key, tuple(row.ids))
            if text not in groups:
                tokens += row.length
                if groups and tokens > self._max_prefill_tokens:
                    break
            groups.setdefault(text, []).append(row)
        admission.groups.extend(groups.values())
        return admission

    def _logits(self, admission: Admission, device: torch.device) -> torch.Tensor:
        """One forward; each row's logits for its next token, shape (B, V)."""
        self._cache.reserve(len(self.rows), max(row.length for row in self.rows))
        computed = sum(map(len, admission.groups))
        decoding = self.rows[: len(self.rows) - computed]
        if admission.twins:
            first = len(decoding) - len(admission.twins)
            sources = [slot for _, slot in admission.twins]
            longest = max(len(row.prompt) for row, _ in admission.twins)
            self._cache.copy(sources, list(range(first, len(decoding))), longest)
        ids, positions, logits_of, plan = _plan(decoding, admission.groups, device)
        self._cache.plan = plan
        return self._forward(
            input_ids=ids[None],
            position_ids=positions[None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=logits_of,
            slot_plan=plan,
        )[0]

    def _sample(self, logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and log-probs, one of each for every row."""
        if self._sampling is None:
            self._sampling = SamplingRows.of([row.request.sampling for row in self.rows])
        counts = np.array([len(row.ids) for row in self.rows], np.int64)
        banned = [
            (index, list(self.rows[index].stop_ids))
            for index in np.flatnonzero(counts < self._sampling.min_new_tokens).tolist()
            if self.rows[index].stop_ids
        ]
        tokens, log_probs = (found.cpu().numpy() for found in sample_tokens(logits, self._sampling, counts, banned))
        if not np.isfinite(log_probs).all():
            raise UserError(
                "the model's logits are not finite numbers: its weights have diverged; go back to an earlier "
                "checkpoint and lower the learning rate"
            )
        return tokens, log_probs


def _plan(
    decoding: list[TokenSequence], groups: list[list[TokenSequence]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | int, StepPlan]:
    """A forward that feeds each decoding row's last token and each group's text: its token ids and their positions,
    both int64 of shape (T,), which logits to keep (an argument of transformers' forwards; 0 is all), and the plan."""
    count = len(decoding)
    one_each, lasts = np.arange(count), np.array([row.length - 1 for row in decoding], np.int64)
    ids, positions = [np.array([row.last for row in decoding], np.int64)], [lasts]
    slots, sources, logits_of = [one_each], [one_each], [one_each]
    places = [lasts]
    segments = []
    for text, first_slot, start, copies in _texts(groups, count):
        segments.append(Segment(first_slot, start, len(text)))
        places_in_text = np.arange(len(text))
        ids.append(text)
        positions.append(places_in_text)
        slots.append(np.repeat(np.arange(first_slot, first_slot + copies), len(text)))
        places.append(np.tile(places_in_text, copies))
        sources.append(np.tile(places_in_text + start, copies))
        logits_of.append(np.full(copies, start + len(text) - 1))

    def tensor(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(device)

    position_ids = tensor(positions)
    plan = StepPlan(
        positions=position_ids[:count],
        longest=int(lasts.max(initial=0)) + 1,
        segments=segments,
        slots=tensor(slots),
        places=tensor(places),
        sources=tensor(sources) if any(len(group) > 1 for group in groups) else None,
    )
    return tensor(ids), position_ids, tensor(logits_of) if groups else 0, plan


def _texts(groups: list[list[TokenSequence]], count: int) -> Iterator[tuple[np.ndarray, int, int, int]]:
    """Each group's text with its first slot, its first token's place in the forward, and how many rows share it."""
    slot = start = count
    for group in groups:
        text = np.array([*group[0].prompt, *group[0].ids], np.int64)
        yield text, slot, start, len(group)
        slot, start = slot + len(group), start + len(text)
