"""Offload and onload of tensors: moves them in place, or streams them through the device in buckets.

- Each tensor has one fixed place on the host, in memory that is pinned once, a gigabyte or more at a time.
- On the device tensors lie in the same order as on the host, so few large copies move them all. A piece of device
  memory is freed once no tensor in it is referenced.
- Copies run on a side stream, concurrently with compute. Wait before using a copy (``Copies.wait``, ``Copies.finish``).
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from verl.errors import UserError
from verl.machine import host_memory
from verl.units import gigabytes

ALIGNMENT = 64  # bytes
PIECE = 1 << 30  # bytes of pinned memory in one piece; a larger tensor has a piece of its own
IN_FLIGHT = 3  # buckets on the device at a time: one comes in, one is worked on, one goes out


class HostMemoryError(UserError):
    """The host could not pin enough memory."""


class Copies:
    """Copies between a device and the host. moves: whether the device has memory of its own."""

    def __init__(self, device: torch.device):
        self.device, self.moves = device, device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def wait(self) -> None:
        """Makes later work on the device wait for all copies so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def finish(self) -> None:
        """Blocks until all copies so far are done."""
        if self._stream is not None:
            self._stream.synchronize()

    def record(self) -> CopyEvent:
        """An event after all copies so far."""
        return CopyEvent(self.device, None if self._stream is None else self._stream.record_event())

    @contextmanager
    def on_side_stream(self) -> Iterator[None]:
        """Copies inside start after the device's work so far, and nothing waits for them."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield

    def to_host(self, tensor: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        place.copy_(tensor, non_blocking=True)
        if self._stream is not None and tensor.is_cuda:
            tensor.record_stream(self._stream)
        return place

    def to_device(self, place: torch.Tensor) -> torch.Tensor:
        """A copy on the device. Call ``wait`` before its use."""
        tensor = place.to(self.device, non_blocking=True, copy=True)
        if self._stream is not None:
            tensor.record_stream(torch.cuda.default_stream(self.device))
        return tensor

    def on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself if it is on the device, else a copy."""
        return tensor if tensor.is_cuda else self.to_device(tensor)


class CopyEvent:
    """A point in a stream of copies."""

    def __init__(self, device: torch.device, event: torch.cuda.Event | None):
        self._device, self._event = device, event

    def wait(self) -> None:
        """Makes later work on the device wait for the copies before this event."""
        if self._event is not None:
            self._event.wait(torch.cuda.current_stream(self._device))

    def finish(self) -> None:
        """Blocks until the copies before this event are done."""
        if self._event is not None:
            self._event.synchronize()


class HostBuffers:
    """Host memory for each of these tensors, in a few pieces, which are pinned if the machine has a GPU.

    Pieces are allocated on first use, so tensors that move one by one never need twice their memory.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]):
        self._pieces: list[list[torch.Tensor]] = []  # the tensors of each piece
        room = 0
        for shard in map(local, tensors):
            if not self._pieces or _aligned(shard.nbytes) > room:
                self._pieces.append([])
                room = max(PIECE, _aligned(shard.nbytes))
            self._pieces[-1].append(torch.empty_like(shard, device="meta"))
            room -= _aligned(shard.nbytes)
        self._places: list[list[torch.Tensor]] = []
        self._unpin: list[Callable[[], object]] = []

    def __iter__(self) -> Iterator[torch.Tensor]:
        for number, shards in enumerate(self._pieces):
            if number == len(self._places):
                self._places.append(self._make(shards))
            yield from self._places[number]

    def _make(self, shards: list[torch.Tensor]) -> list[torch.Tensor]:
        sizes = [_aligned(shard.nbytes) for shard in shards]
        if not sum(sizes):
            return [torch.empty_like(shard, device="cpu") for shard in shards]
        memory = self._pinned(sum(sizes))
        parts = zip(memory.split(sizes), shards, strict=True)
        return [part[: shard.nbytes].view(shard.dtype).view(shard.shape) for part, shard in parts]

    def _pinned(self, nbytes: int) -> torch.Tensor:
        try:
            pages = mmap.mmap(-1, nbytes)  # whole pages, so that pinning affects nothing else
        except OSError as error:
            raise self._refused(nbytes, error.strerror or str(error)) from error
        memory = torch.frombuffer(pages, dtype=torch.uint8)
        if torch.cuda.is_available():
            address, runtime = memory.data_ptr(), torch.cuda.cudart()
            status = runtime.cudaHostRegister(address, nbytes, 0)
            if int(status):
                del memory, pages  # a reference to the error would keep this frame alive
                raise self._refused(nbytes, runtime.cudaGetErrorString(status))
            self._unpin.append(weakref.finalize(self, runtime.cudaHostUnregister, address))
        return memory

    def _refused(self, nbytes: int, reason: str) -> HostMemoryError:
        wanted = sum(_aligned(shard.nbytes) for shards in self._pieces for shard in shards)
        had = host_memory()
        return HostMemoryError(
            f"{gigabytes(nbytes)} of host memory could not be pinned ({reason}), of {gigabytes(wanted)} that a model's "
            f"offloaded tensors take on this rank; this machine has {gigabytes(had.available)} available of "
            f"{gigabytes(had.total)}. Leave param_offload or optimizer_offload off for some models, or take more "
            "machines; trainer.dry_run=True shows what each model holds, and the keys"
        )

    def close(self) -> None:
        for unpin in self._unpin:
            unpin()
        self._places.clear()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def through_device(
    buckets: Sequence[list[torch.Tensor]], copies: Copies, work: Callable[[int, list[torch.Tensor]], None]
) -> None:
    """Calls ``work(number, tensors)`` on each bucket, with its tensors on the device.

    Tensors on the host are copied to the device and back. Copies overlap with work: while a bucket is worked on, the
    next one is copied in and the previous one out.
    """
    outward = Copies(copies.device)
    gone: list[CopyEvent] = []

    def fetch(number: int) -> tuple[list[torch.Tensor], CopyEvent]:
        if number >= IN_FLIGHT:
            gone[number - IN_FLIGHT].finish()  # then its memory is free
        with copies.on_side_stream():
            return [copies.on_device(place) for place in buckets[number]], copies.record()

    coming = fetch(0) if buckets else None
    for number, places in enumerate(buckets):
        assert coming is not None
        tensors, arrived = coming
        coming = fetch(number + 1) if number + 1 < len(buckets) else None
        arrived.wait()
        work(number, tensors)
        with outward.on_side_stream():
            for tensor, place in zip(tensors, places, strict=True):
                if tensor is not place:
                    outward.to_host(tensor, place)
            gone.append(outward.record())
    outward.finish()


def spans(rows: Iterable[tuple[torch.Tensor, ...]]) -> Iterator[list[list[torch.Tensor]]]:
    """Groups consecutive rows of tensors that one copy per column can move; yields each group as columns.

    In a group each column lies in one storage, in order, and all columns have the same distances.
    """
    run: list[tuple[torch.Tensor, ...]] = []
    for row in rows:
        if run and not _alike(run[0], run[-1], row):
            yield [list(column) for column in zip(*run, strict=True)]
            run = []
        run.append(row)
    if run:
        yield [list(column) for column in zip(*run, strict=True)]


def _alike(first: Sequence[torch.Tensor], last: Sequence[torch.Tensor], row: Sequence[torch.Tensor]) -> bool:
    if not all(tensor.nbytes for tensor in (*first, *row)):
        return False
    distances = {tensor.data_ptr() - start.data_ptr() for start, tensor in zip(first, row, strict=True)}
    return len(distances) == 1 and all(
        tensor.untyped_storage().data_ptr() == end.untyped_storage().data_ptr()
        and tensor.data_ptr() >= end.data_ptr() + end.nbytes
        and end.is_contiguous()
        and tensor.is_contiguous()
        for end, tensor in zip(last, row, strict=True)
    )


def span(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """uint8 view of one storage from the first tensor to the end of the last. A single tensor is returned as it is."""
    first, last = tensors[0], tensors[-1]
    if len(tensors) == 1:
        return first
    storage = first.untyped_storage()
    nbytes = last.data_ptr() + last.nbytes - first.data_ptr()
    flat = torch.empty(0, dtype=torch.uint8, device=first.device)
    return flat.set_(storage, first.data_ptr() - storage.data_ptr(), (nbytes,), (1,))


def split_like(copied: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Splits a copy of ``span(tensors)`` into copies of the tensors."""
    if len(tensors) == 1:
        return [copied]
    starts = [tensor.data_ptr() - tensors[0].data_ptr() for tensor in tensors]
    parts = zip(starts, tensors, strict=True)
    return [copied[start : start + each.nbytes].view(each.dtype).view(each.shape) for start, each in parts]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a sharded tensor, or the tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.data


class MovableTensors:
    """Tensors that keep their identity while their storage moves between host and device.

    changed: whether values on the device may differ from those on the host. Code that changes them sets it; unchanged
        tensors are not copied back.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], copies: Copies, loaded: bool = True):
        """loaded: whether they are on the device now."""
        self._tensors, self._copies = tensors, copies
        self._on_device = len(tensors) if loaded else 0  # that many, from the first
        self._host = HostBuffers(tensors) if copies.moves and not loaded else None
        self.changed = self._host is None
        if self._host:
            with self._all_or_nothing():
                for tensor, place in zip(tensors, self._host, strict=True):
                    give_storage(tensor, place.copy_(local(tensor)))

    @property
    def loaded(self) -> bool:
        """Whether all tensors are on the device. False once closed."""
        return 0 < self._on_device == len(self._tensors)

    @property
    def loaded_bytes(self) -> int:
        return sum(local(tensor).nbytes for tensor in self._tensors[: self._on_device])

    def refresh(self) -> None:
        """Starts to copy changed values to the host, so that the next offload has nothing to copy."""
        if self._on_device and self._copies.moves and self.changed:
            self._host = self._host or HostBuffers(self._tensors)
            with self._all_or_nothing(), self._copies.on_side_stream():
                pairs = zip(map(local, self._tensors[: self._on_device]), self._host, strict=False)
                for tensors, places in spans(pairs):
                    self._copies.to_host(span(tensors), span(places))
            self.changed = False

    def offload(self) -> None:
        self.refresh()
        if self._on_device and self._copies.moves:
            self._to_host()
        self._on_device = 0

    def onload(self, limit: int | None = None) -> None:
        """limit: most bytes on the device. Tensors beyond it stay on the host."""
        count = len(self._tensors) if limit is None else self._first_within(limit)
        if count > self._on_device and self._copies.moves:
            self._to_device(count)
        self._on_device = max(self._on_device, count)

    def _first_within(self, limit: int) -> int:
        for count, tensor in enumerate(self._tensors):
            limit -= local(tensor).nbytes
            if limit < 0:
                return count
        return len(self._tensors)

    def _to_host(self) -> None:
        assert self._host is not None
        for tensor, place in zip(self._tensors[: self._on_device], self._host, strict=False):
            self._give(tensor, place)

    def _to_device(self, count: int) -> None:
        coming = iter(self._tensors[self._on_device : count])
        with self._copies.on_side_stream():  # FSDP may have moved a shard that it pads
            for (places,) in spans((local(tensor),) for tensor in self._tensors[self._on_device : count]):
                for storage in split_like(self._copies.to_device(span(places)), places):
                    self._give(next(coming), storage)

    def _give(self, tensor: torch.Tensor, storage: torch.Tensor) -> None:
        give_storage(tensor, storage)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """If not all memory can be pinned, none stays pinned."""
        try:
            yield
        except HostMemoryError:
            self.close()
            raise

    def close(self) -> None:
        if self._host is not None:
            self._copies.finish()
            self._host.close()
        self._host, self._tensors, self._on_device = None, (), 0


class MovableModule(MovableTensors):
    """A module's parameters, sharded or not, and buffers."""

    def __init__(self, module: nn.Module, copies: Copies):
        super().__init__([*module.parameters(), *module.buffers()], copies)
        self._module = module
        self._padded = any(map(_is_padded, self._tensors))
        self._given: dict[int, torch.Tensor] = {}  # a sharded parameter's new storage, by its id

    def _to_host(self) -> None:
        super()._to_host()
        if self._padded:  # FSDP copies padded shards on the host
            self._copies.finish()
        self._update_fsdp()

    def _to_device(self, count: int) -> None:
        super()._to_device(count)
        self._copies.wait()
        self._update_fsdp()

    def _give(self, tensor: torch.Tensor, storage: torch.Tensor) -> None:
        if isinstance(tensor, DTensor):
            self._given[id(tensor)] = storage
        else:
            give_storage(tensor, storage)

    def _update_fsdp(self) -> None:
        """Tells FSDP where its shards are now, through ``_apply``, which ``Module.to`` calls. It swaps a parameter's
        contents with those of another tensor; for tied parameters once for each name."""
        if not self._given:
            return

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, DTensor):
                return tensor
            storage = self._given.get(id(tensor), tensor._local_tensor)
            return DTensor(storage, tensor._spec, requires_grad=False)

        with torch.no_grad():
            self._module._apply(moved)
        self._given.clear()


def _is_padded(tensor: torch.Tensor) -> bool:
    """Whether FSDP pads this shard to the size of the other ranks' shards."""
    if not isinstance(tensor, DTensor):
        return False
    placements = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return any(
        local(tensor).shape[place.dim] < -(-tensor.shape[place.dim] // ranks)
        for ranks, place in placements
        if isinstance(place, Shard)
    )


def give_storage(tensor: torch.Tensor, storage: torch.Tensor) -> None:
    if isinstance(tensor, DTensor):
        tensor._local_tensor = storage
    else:
        tensor.data = storage
