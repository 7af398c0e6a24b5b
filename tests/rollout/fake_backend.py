"""A backend that draws what can be foretold: the token at a place of the sequence depends on the place alone, so that
a response drawn in pieces is the one drawn at once, if and only if nothing was lost, doubled or drawn too much."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from verl.errors import UserError
from verl.rollout.client.backend import EngineDied, GenerateRequest, Listener, TokenChunk, WeightStream
from verl.rollout.contract.base import Capabilities, FinishReason, MemoryTag

EOS = 1


def token_at(place: int) -> int:
    return 10 + place * 7 % 80


def response(prompt: int, length: int) -> list[int]:
    """To a prompt of this length."""
    return [token_at(place) for place in range(prompt, prompt + length)]


def elsewhere(work: Callable[[], object]) -> None:
    """In another thread; what it raises is raised here."""
    with ThreadPoolExecutor(1) as threads:
        threads.submit(work).result()


@dataclass
class UnderWay:
    request: GenerateRequest
    ids: list[int] = field(default_factory=list)
    reported: int = 0
    aborted: bool = False


class FakeBackend:
    """Each ``step`` draws one token of every draw, in a thread of its own; ``go`` has another thread step all the time.

    log: the orders that came, in order. ends: places where the end token is drawn. engine_ends: tokens that the engine
    always stops at (unless asked to stream). room: the longest sequence. fails: orders that raise this.
    """

    def __init__(
        self,
        *,
        sleep: Sequence[MemoryTag] = (),
        keeps_weights: bool = False,
        ends: Sequence[int] = (),
        engine_ends: Sequence[int] = (EOS,),
        room: int = 10_000,
    ):
        self.capabilities = Capabilities(sleep=frozenset(sleep), own_process=True)
        self.keeps_weights, self.ends, self.engine_ends, self.room = keeps_weights, set(ends), set(engine_ends), room
        self.log: list[str] = []
        self.requests: list[GenerateRequest] = []  # all that ever came
        self.update_seconds: dict[str, float] = {}
        self.under_way: dict[str, UnderWay] = {}
        self.fails: dict[str, Exception] = {}
        self.on_generate: Callable[[], None] = lambda: None
        self.closed = False
        self._lock = threading.Lock()
        self._listener: Listener | None = None

    # ---- drawing

    def step(self, times: int = 1) -> None:
        elsewhere(lambda: [self._step() for _ in range(times)])

    def go(self) -> None:
        def run() -> None:
            while not self.closed:
                self._step()
                time.sleep(0.0005)

        threading.Thread(target=run, daemon=True).start()

    def _step(self) -> None:
        with self._lock:
            reports = [report for each in list(self.under_way.values()) if (report := self._generate_one(each))]
        self._listener.received(reports)  # not under the lock: the client gives orders under its own

    def _generate_one(self, each: UnderWay) -> TokenChunk | None:
        finish: FinishReason | None = "abort"
        if not each.aborted:
            each.ids.append(self._token(each))
            finish = self._finish(each)
        if finish:
            del self.under_way[each.request.id]
        elif not each.request.stream:
            return None
        new, start = each.ids[each.reported :], len(each.request.prompt_ids) + each.reported
        each.reported = len(each.ids)
        return TokenChunk(each.request.id, new, [-(start + index) / 100 for index in range(len(new))], finish)

    def _token(self, each: UnderWay) -> int:
        place = len(each.request.prompt_ids) + len(each.ids)
        return EOS if place in self.ends else token_at(place)

    def _finish(self, each: UnderWay) -> FinishReason | None:
        if not each.request.stream and each.ids[-1] in each.request.stop_ids:
            return "stop"
        full = len(each.request.prompt_ids) + len(each.ids) >= self.room
        return "length" if full or len(each.ids) >= each.request.max_new_tokens else None

    def end_by_itself(self, finish: FinishReason) -> None:
        """All draws end now, in another thread, whether or not they were recalled."""
        with self._lock:
            ended, self.under_way = self.under_way, {}
        reports = [TokenChunk(id, [self._token(each)], [-0.5], finish) for id, each in ended.items()]
        elsewhere(lambda: self._listener.received(reports))

    def fail(self, request_id: str, error: Exception) -> None:
        del self.under_way[request_id]
        self._listener.failed(request_id, error)

    def die(self) -> None:
        """As a process does: from its reader thread."""
        elsewhere(lambda: self._listener.died(EngineDied("the fake engine was killed")))

    # ---- Backend

    def listen(self, listener: Listener) -> None:
        self._listener = listener

    def stops_at(self, stop_ids: frozenset[int]) -> bool:
        return not stop_ids or stop_ids >= self.engine_ends

    def generate(self, requests: Sequence[GenerateRequest]) -> None:
        self._note("generate")
        self.on_generate()
        with self._lock:
            self.requests += requests
            self.under_way |= {request.id: UnderWay(request) for request in requests}

    def abort(self, request_ids: Sequence[str]) -> None:
        self._note("abort")
        with self._lock:
            for id in request_ids:
                if id in self.under_way:
                    self.under_way[id].aborted = True

    def update_weights(self, stream: WeightStream, version: int) -> None:
        self._note("update_weights")
        self._check_idle()
        names = [name for name, _ in stream]
        if "wrong" in names:
            raise UserError("wrong has no place here")

    def check_weights(self, stream: WeightStream) -> list[str]:
        self._note("check_weights")
        return []

    def sleep(self, tags: Sequence[MemoryTag]) -> None:
        self._note(f"sleep {' '.join(tags)}")
        self._check_idle()

    def wake(self, tags: Sequence[MemoryTag]) -> None:
        self._note(f"wake {' '.join(tags)}")

    def drop_cache(self) -> None:
        """Waits until the engine is idle, which draws that nobody wants any more soon let it be."""
        self._note("drop_cache")
        while any(each.aborted for each in self.under_way.values()):
            self._step()

    def health(self) -> None:
        self._note("health")

    def close(self) -> None:
        self.log.append("close")
        self.closed = True

    def _note(self, order: str) -> None:
        self.log.append(order)
        if error := self.fails.get(order):
            raise error

    def _check_idle(self) -> None:
        assert not self.under_way, "the engine is not idle"
