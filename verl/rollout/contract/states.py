"""Which orders make sense now. One that an engine would answer with a crash is refused here, before it is sent."""

from __future__ import annotations

from collections.abc import Sequence

from verl.rollout.contract.base import Capabilities, IllegalState, MemoryTag, Unsupported

TAGS: tuple[MemoryTag, ...] = ("weights", "kv_cache")


class EngineState:
    """awake: what is in the device's memory. no_weights: why there are none to generate with; None when there are.

    keeps_weights: whether weights are still there after they slept. busy: the order that is under way and needs the
    engine for itself; None if there is none.

    In the checks, in_flight: requests that have not been answered; under_way: those of them that are being drawn.
    """

    def __init__(self, capabilities: Capabilities, keeps_weights: bool, no_weights: str | None):
        self._can_sleep, self._keeps_weights = capabilities.sleep, keeps_weights
        self._holds_weights = capabilities.holds_weights
        self.awake: set[MemoryTag] = set(TAGS)
        self.no_weights = no_weights
        self.paused = self.closed = False
        self.busy: str | None = None

    def check_open(self, order: str) -> None:
        if self.closed:
            raise IllegalState(f"{order}: the engine is closed")

    def _check_free(self, order: str) -> None:
        self.check_open(order)
        if self.busy:
            raise IllegalState(f"{order}: {self.busy} is under way; wait until it has returned")

    def check_generate(self) -> None:
        """While the engine is paused, requests queue, also during a weight update: ``resume`` checks again."""
        self.check_open("generate")
        if self.busy and self.paused:
            return
        self._check_free("generate")
        self._check_awake("generate", TAGS)
        if self.no_weights:
            raise IllegalState(f"generate: {self.no_weights}; call update_weights first")

    def check_update(self, order: str, in_flight: int, under_way: int) -> None:
        self._check_free(order)
        if self._holds_weights:
            self._check_awake(order, ("weights",))
        self._check_idle(order, in_flight, under_way)

    def check_pause(self) -> None:
        self._check_free("pause")
        if self.paused:
            raise IllegalState("pause: the engine is already paused")

    def check_resume(self, under_way: int) -> None:
        self._check_free("resume")
        if not self.paused:
            raise IllegalState("resume: the engine is not paused")
        self._check_idle("resume", 0, under_way)
        self._check_awake("resume", TAGS)
        if self.no_weights:
            raise IllegalState(f"resume: {self.no_weights}; call update_weights first")

    def check_sleep(self, tags: Sequence[MemoryTag], in_flight: int, under_way: int) -> None:
        self._check_tags("sleep", tags)
        self._check_idle("sleep", in_flight, under_way)
        if asleep := [tag for tag in tags if tag not in self.awake]:
            raise IllegalState(f"sleep: {', '.join(asleep)} already asleep")

    def check_wake(self, tags: Sequence[MemoryTag]) -> None:
        self._check_tags("wake", tags)
        if awake := [tag for tag in tags if tag in self.awake]:
            raise IllegalState(f"wake: {', '.join(awake)} already awake")

    def slept(self, tags: Sequence[MemoryTag]) -> None:
        self.awake -= set(tags)
        if "weights" in tags and not self._keeps_weights:
            self.no_weights = "its weights were given up in sleep"

    def woke(self, tags: Sequence[MemoryTag]) -> None:
        self.awake |= set(tags)

    def _check_tags(self, order: str, tags: Sequence[MemoryTag]) -> None:
        self._check_free(order)
        if not self._can_sleep:
            raise Unsupported(f"{order}: this engine cannot sleep here; it gives memory back only when closed")
        for tag in tags:
            if tag not in self._can_sleep:
                raise Unsupported(
                    f"{order}: there is no memory tag {tag!r} (known: {', '.join(sorted(self._can_sleep))})"
                )
        if len(set(tags)) < len(tags):
            raise IllegalState(f"{order}: a tag is named twice in {', '.join(tags)}")

    def _check_awake(self, order: str, tags: Sequence[MemoryTag]) -> None:
        if asleep := [tag for tag in tags if tag not in self.awake]:
            raise IllegalState(f"{order}: {', '.join(asleep)} asleep; wake first")

    def _check_idle(self, order: str, in_flight: int, under_way: int) -> None:
        if in_flight and not self.paused:
            raise IllegalState(f"{order}: {in_flight} requests are being generated; pause or abort them first")
        if under_way:
            raise IllegalState(f"{order}: {under_way} requests are still being drawn; wait until pause has returned")
