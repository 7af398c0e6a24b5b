"""The decode loop of the embedded engine, one step at a time: rows in, finished rows out. Knows nothing of asyncio."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PretrainedConfig

from verl.rollout.base import FinishReason, Request, Result
from verl.rollout.kv_cache import SPAN_STEP, Segment, SlotCache, StepPlan, slots_attending
from verl.rollout.sampling import SamplingRows, draw
from verl.rollout.stops import StopWatch


@dataclass(eq=False)
class Row:
    """A response under way. ``stop_ids``: every token that ends it. ``versions``: as in Result."""

    request: Request
    future: asyncio.Future[Result]
    stop_ids: frozenset[int]
    watch: StopWatch | None
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.request.prompt_ids) + len(self.ids)

    def result(self, reason: FinishReason) -> Result:
        versions = [(version, first) for version, first in self.versions if first < len(self.ids)]
        return Result(self.request.id, self.ids, self.log_probs, reason, versions)

    def take(self, token: int, log_prob: float, version: int) -> FinishReason | None:
        """Append a token; why the response ends with it, if it does."""
        if not self.versions or self.versions[-1][0] != version:
            self.versions.append((version, len(self.ids)))
        self.ids.append(token)
        self.log_probs.append(log_prob)
        said_stop = self.watch is not None and self.watch.push(token)
        sampling = self.request.sampling
        if token in self.stop_ids or (said_stop and len(self.ids) >= sampling.min_new_tokens):
            return "stop"
        return "length" if len(self.ids) >= sampling.max_new_tokens else None


class Decoder:
    """Up to ``max_num_seqs`` rows in the slots of a cache; slot = index in ``rows``.

    forward: ``forward(input_ids=..., position_ids=..., ...)`` of a transformers causal LM of this config.
    max_prefill_tokens: prompt tokens that one step may add (one prompt at least).
    """

    def __init__(
        self,
        forward: Callable[..., torch.Tensor],
        config: PretrainedConfig,
        max_num_seqs: int,
        max_model_len: int,
        max_prefill_tokens: int,
    ):
        self._forward, self._config = forward, config
        self._max_num_seqs, self._max_prefill_tokens = max_num_seqs, max_prefill_tokens
        self._cache = SlotCache(max_num_seqs, max_model_len)
        self.rows: list[Row] = []
        self._sampling: SamplingRows | None = None  # of self.rows; None after any change

    @torch.no_grad()
    def step(self, waiting: deque[Row], version: int, device: torch.device) -> list[tuple[Row, FinishReason]]:
        """Admit what there is room for, draw one token for every row, and give up the rows that this ended.

        Failing, it leaves all rows where they were."""
        decoding = len(self.rows)
        admitted = self._admissible(waiting)
        ids, position_ids, logits_of, plan = self._plan(admitted, device)
        rows = self.rows + [row for group in admitted for row in group]
        self._cache.plan = plan
        with slots_attending(self._config):
            logits = self._forward(
                input_ids=ids[None],
                position_ids=position_ids[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=logits_of if admitted else 0,
                slot_plan=plan,
            )[0]
        if admitted or self._sampling is None:
            self._sampling = SamplingRows.of([row.request.sampling for row in rows])
        positions = np.array([len(row.ids) for row in rows], np.int64)
        tokens, log_probs = draw(logits, self._sampling, positions, self._banned(rows))
        for _ in range(len(rows) - decoding):
            waiting.popleft()
        self.rows = rows
        reasons = [
            row.take(token, log_prob, version)
            for row, token, log_prob in zip(rows, tokens.tolist(), log_probs.tolist(), strict=True)
        ]
        ended = [(row, reason) for row, reason in zip(rows, reasons, strict=True) if reason]
        if ended:
            self.remove({row for row, _ in ended})
        return ended

    def remove(self, leaving: Collection[Row]) -> None:
        """Give up these rows; the last rows move into their slots."""
        kept = [row for row in self.rows if row not in leaving]
        if len(kept) == len(self.rows):
            return
        holes = [slot for slot, row in enumerate(self.rows[: len(kept)]) if row in leaving]
        movers = [slot for slot, row in enumerate(self.rows) if slot >= len(kept) and row not in leaving]
        if movers:
            self._cache.move(movers, holes, max(self.rows[slot].length for slot in movers))
        for hole, mover in zip(holes, movers, strict=True):
            self.rows[hole] = self.rows[mover]
        del self.rows[len(kept) :]
        self._sampling = None

    def clear(self) -> list[Row]:
        """Free the cache and give up all rows, which are returned; admitted again, they go on where they were."""
        rows, self.rows, self._sampling = self.rows, [], None
        self._cache.clear()
        return rows

    def _admissible(self, waiting: deque[Row]) -> list[list[Row]]:
        """The next rows for the free slots, those with one text grouped: they share a prefill."""
        groups: dict[tuple[int, ...], list[Row]] = {}
        free, tokens = self._max_num_seqs - len(self.rows), 0
        for row in waiting:
            text = (*row.request.prompt_ids, *row.ids)
            if text not in groups:
                tokens += len(text)
                if groups and tokens > self._max_prefill_tokens:
                    break
            if free == 0:
                break
            free -= 1
            groups.setdefault(text, []).append(row)
        return list(groups.values())

    def _plan(
        self, admitted: list[list[Row]], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, StepPlan]:
        """The next forward: its tokens and their positions, both (T,), whose logits to keep, and what else it does."""
        decoding = len(self.rows)
        lengths = np.array([row.length for row in self.rows], np.int64)
        texts = [np.array((*group[0].request.prompt_ids, *group[0].ids), np.int64) for group in admitted]
        copies = [len(group) for group in admitted]
        self._cache.reserve(decoding + sum(copies), max([*lengths.tolist(), *map(len, texts)]))
        width = self._cache.length

        ids = [np.array([row.ids[-1] for row in self.rows], np.int64), *texts]
        positions = [lengths - 1, *(np.arange(len(text)) for text in texts)]
        sources = [np.arange(decoding)]
        targets = [np.arange(decoding) * width + lengths - 1]
        logits_of = [np.arange(decoding)]
        segments, start, slot = [], decoding, decoding
        for text, count in zip(texts, copies, strict=True):
            segments.append(Segment(slot, start, len(text)))
            sources += [np.arange(start, start + len(text))] * count
            targets += [other * width + np.arange(len(text)) for other in range(slot, slot + count)]
            start, slot = start + len(text), slot + count
            logits_of.append(np.full(count, start - 1))

        def tensor(parts: list[np.ndarray]) -> torch.Tensor:
            return torch.from_numpy(np.concatenate(parts)).to(device)

        position_ids = tensor(positions)
        longest = int(lengths.max(initial=1))
        plan = StepPlan(
            positions=position_ids[:decoding],
            segments=segments,
            span=min(width, -(-longest // SPAN_STEP) * SPAN_STEP),
            write_to=tensor(targets),
            write_from=tensor(sources) if slot > decoding + len(segments) else None,
        )
        return tensor(ids), position_ids, tensor(logits_of), plan

    def _banned(self, rows: list[Row]) -> list[tuple[int, list[int]]]:
        """The stop tokens of rows that may not end yet."""
        return [
            (index, list(row.stop_ids))
            for index, row in enumerate(rows)
            if row.stop_ids and len(row.ids) < row.request.sampling.min_new_tokens
        ]
