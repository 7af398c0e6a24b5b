"""Weights that go to other processes, and what is said of them there."""

from __future__ import annotations

import gc
import itertools
import math
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from forks import FORKS
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from weight_receivers import content, receive

from verl.errors import UserError
from verl.rollout.weights import checksums, sender
from verl.rollout.weights.buckets import SharedBuffer, opened
from verl.rollout.weights.checksums import Piece, checksum, differences, piece_of
from verl.rollout.weights.sender import PARTS, ReceiverLost, WeightSender

CPU = torch.device("cpu")
GONE = (EOFError, ConnectionError)  # what a receiver makes of a sender that is
BUCKET = 4096
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int16, torch.int32, torch.bool]


class Receivers:
    """Processes at the other end of a sender; each serves one session a ``session()``."""

    def __init__(self, address: str, options: list[dict], key: bytes):
        self.controls, self.processes = [], []
        for rank, each in enumerate(options):
            ours, theirs = FORKS.Pipe()
            process = FORKS.Process(target=receive, args=(theirs, address, key, rank, each), daemon=True)
            process.start()
            theirs.close()
            self.controls.append(ours)
            self.processes.append(process)

    def session(self) -> None:
        for control in self.controls:
            control.send("session")

    def held(self) -> list:
        """Of each: the tensors that it holds after its session, or the error that ended that."""
        return [self._held(control) for control in self.controls]

    def _held(self, control: Connection):
        try:
            return control.recv() if control.poll(20) else None
        except EOFError:
            return None  # it is no more

    def close(self) -> None:
        for process, control in zip(self.processes, self.controls, strict=True):
            control.close()
            process.kill()
            process.join()
            process.close()


@contextmanager
def transport(*options: dict, dtype: torch.dtype | None = None, bucket: int = BUCKET, key: bytes | None = None):
    with ExitStack() as stack:
        end = WeightSender(receivers=len(options), device=CPU, dtype=dtype, bucket_bytes=bucket)
        stack.callback(end.close)
        receivers = Receivers(end.endpoint.address, list(options), key or bytes.fromhex(end.endpoint.key))
        stack.callback(receivers.close)
        yield end, receivers


def send(end: WeightSender, receivers: Receivers, stream) -> dict[str, float]:
    """Gives the session's seconds."""
    receivers.session()
    with end.session(lambda: True) as session:
        session.load(stream)
    return session.seconds


def random_tensors(seed: int, count: int) -> dict[str, torch.Tensor]:
    """Of every dtype and up to four dimensions, some empty, some larger than a bucket, some not contiguous."""
    request, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
    tensors = {}
    for index in range(count):
        shape = [request.choice([0, 1, 2, 3, 5, 8, 13]) for _ in range(request.randint(0, 4))]
        if index % 10 == 7:
            shape = [request.randint(BUCKET - 2, 3 * BUCKET)]
        values = torch.randint(-1000, 1000, shape, generator=numbers)
        tensor = values.to(request.choice(DTYPES))
        tensors[f"layers.{index}.weight"] = tensor.transpose(0, -1) if tensor.dim() > 1 and index % 3 else tensor
    return tensors


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No shared memory, no open file, no thread."""
    shared = Path("/dev/shm")

    def ours() -> set[Path]:
        return set(shared.glob("verl-*"))

    with FORKS.Pool(1):  # the fork server and its helper have started
        pass
    before, files, threads = ours(), psutil.Process().num_fds(), threading.active_count()
    yield
    gc.collect()  # errors that were caught refer to what was open
    assert ours() <= before
    assert psutil.Process().num_fds() <= files
    assert threading.active_count() <= threads


# --- transport -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_receiver_holds_exactly_what_was_sent(ranks):
    tensors = random_tensors(seed=ranks, count=80)
    with transport(*[{}] * ranks) as (end, receivers):
        for version in range(2):
            if version:
                tensors = {name: tensor.flip(0) if tensor.dim() else tensor for name, tensor in tensors.items()}
            seconds = send(end, receivers, tensors.items())
            assert all(seconds[part] > 0 for part in PARTS)
            expected = {name: content(tensor) for name, tensor in tensors.items()}
            assert receivers.held() == [expected] * ranks


def test_a_stream_may_reuse_the_memory_of_a_tensor_that_it_has_handed_out():
    """As the gathering of shards does."""
    scratch = torch.empty(3 * BUCKET, dtype=torch.uint8)

    def stream():
        for index in range(40):
            size = 3 * BUCKET if index % 5 == 4 else 500
            yield str(index), scratch[:size].fill_(index)
            scratch.fill_(255)

    with transport({}, {}) as (end, receivers):
        send(end, receivers, stream())
        for held in receivers.held():
            assert {int(name): data for name, (_, _, data) in held.items()} == {
                index: bytes([index]) * (3 * BUCKET if index % 5 == 4 else 500) for index in range(40)
            }


def test_an_empty_stream_is_an_update_with_nothing_in_it():
    with transport({}) as (end, receivers):
        send(end, receivers, [])
        assert receivers.held() == [{}]


def test_floating_point_tensors_are_cast_to_what_the_engine_computes_in():
    tensors = {"a": torch.randn(1000), "b": torch.randn(7, 5, dtype=torch.float64), "c": torch.arange(9)}
    with transport({}, dtype=torch.bfloat16) as (end, receivers):
        send(end, receivers, tensors.items())
        expected = {"a": tensors["a"].bfloat16(), "b": tensors["b"].bfloat16(), "c": tensors["c"]}
        assert receivers.held() == [{name: content(tensor) for name, tensor in expected.items()}]


def test_names_that_one_receiver_refuses_are_told_and_the_next_update_works():
    names = ["a", "b", "large"]
    tensors = {"a": torch.ones(3), "b": torch.ones(5), "large": torch.ones(BUCKET)}
    with transport({}, {"names": names}) as (end, receivers):
        for wrong, says in (
            ({**tensors, "c": torch.ones(1)}, "rank 1 of the engine: c has no place here"),
            ({**tensors, "larger": torch.ones(BUCKET)}, "rank 1 of the engine: larger has no place here"),
            ({"a": torch.ones(3)}, "rank 1 of the engine: was not sent b, large"),
        ):
            with pytest.raises(UserError, match=says):
                send(end, receivers, wrong.items())
            assert all(isinstance(held, GONE) for held in receivers.held())
        send(end, receivers, tensors.items())
        assert receivers.held()[1] == {name: content(tensor) for name, tensor in tensors.items()}


def test_tensors_of_an_update_that_broke_off_do_not_count_as_those_of_the_next():
    with transport({"names": ["a", "b"]}) as (end, receivers):

        def breaks():
            yield "a", torch.ones(BUCKET)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            send(end, receivers, breaks())
        assert isinstance(receivers.held()[0], GONE)
        with pytest.raises(UserError, match="was not sent a"):
            send(end, receivers, [("b", torch.ones(2))])


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, UserError])
def test_an_error_of_the_stream_is_the_streams_own(error):
    def breaks():
        yield "a", torch.ones(10)
        raise error("of the stream")

    with transport({}, {}) as (end, receivers):
        with pytest.raises(error, match="of the stream") as caught:
            send(end, receivers, breaks())
        assert not isinstance(caught.value, ReceiverLost)
        assert all(isinstance(held, GONE) for held in receivers.held())


@pytest.mark.parametrize("place", ["first", "large", "last"])
def test_a_receiver_that_dies_in_the_middle_is_noticed_at_once(place):
    tensors = {"first": torch.ones(10), "large": torch.ones(BUCKET), "more": torch.ones(900), "last": torch.ones(900)}
    with transport({}, {"ends_at": place}) as (end, receivers):
        began = time.monotonic()
        with pytest.raises(ReceiverLost, match="rank 1 left"):
            send(end, receivers, tensors.items())
        assert time.monotonic() - began < 5
        assert isinstance(receivers.held()[0], GONE)


def test_a_receiver_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(sender, "ANSWER_TIMEOUT", 1)
    says = "rank 1 did not answer 'load' within 1 s"
    with transport({}, {"stops_at": "a"}) as (end, receivers), pytest.raises(ReceiverLost, match=says):
        send(end, receivers, [("a", torch.ones(3))])


def test_a_receiver_that_never_comes_is_waited_for_as_long_as_that_makes_sense(monkeypatch):
    with transport({}, {}) as (end, receivers):
        receivers.controls[0].send("session")  # the other stays where it is
        monkeypatch.setattr(sender, "ARRIVAL_TIMEOUT", 0.3)
        with pytest.raises(ReceiverLost, match="did not come"), end.session(lambda: True):
            raise AssertionError
        monkeypatch.setattr(sender, "ARRIVAL_TIMEOUT", 60)
        began = time.monotonic()
        with pytest.raises(ReceiverLost, match="gone"), end.session(lambda: time.monotonic() < began + 0.3):
            raise AssertionError
        assert time.monotonic() - began < 5


def test_who_does_not_know_the_key_is_refused_and_the_receivers_are_still_waited_for():
    with transport({}) as (end, receivers):
        refused: list[Exception] = []

        def intrude() -> None:
            socket.socket(socket.AF_UNIX).connect(end.endpoint.address)  # and leaves
            try:
                Client(end.endpoint.address, family="AF_UNIX", authkey=b"a guess")
            except AuthenticationError as error:
                refused.append(error)
            receivers.session()

        intruder = threading.Thread(target=intrude)
        intruder.start()
        with end.session(lambda: True) as session:
            session.load([("a", torch.ones(3))])
        intruder.join(5)
        assert len(refused) == 1
        assert receivers.held() == [{"a": content(torch.ones(3))}]


def test_a_receiver_refuses_a_sender_that_does_not_know_the_key():
    with transport({}, key=b"another key") as (end, receivers):
        receivers.session()
        with pytest.raises(ReceiverLost), end.session(lambda: not receivers.controls[0].poll()):
            raise AssertionError
        assert isinstance(receivers.held()[0], AuthenticationError)


def test_the_socket_is_nobody_elses():
    end = WeightSender(receivers=1, device=CPU, dtype=None, bucket_bytes=BUCKET)
    folder = Path(end.endpoint.address).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    end.close()
    assert not folder.exists()


def test_memory_that_is_not_there_is_an_error_and_not_a_crash():
    with pytest.raises(OSError, match="MiB of memory for weight buckets"):
        SharedBuffer(1 << 60, CPU)


def test_a_shared_buffer_is_the_same_bytes_after_its_name_is_forgotten():
    buffer = SharedBuffer(100, CPU)
    other = opened(buffer.handle)
    buffer.forget()
    buffer.tensor.fill_(7)
    assert other.tolist() == [7] * 100
    with pytest.raises(FileNotFoundError):
        opened(buffer.handle)


def test_differences_are_found_between_the_stream_and_what_receivers_hold():
    tensors = {name: tensor for name, tensor in random_tensors(seed=5, count=30).items() if tensor.numel()}
    with transport({}, {}) as (end, receivers):
        send(end, receivers, tensors.items())
        receivers.held()
        receivers.session()
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        changed["layers.7.weight"].view(torch.uint8)[5] ^= 1
        with end.session(lambda: True) as session:
            assert differences(tensors.items(), session.pieces()) == []
            (found,) = differences(changed.items(), session.pieces())
        assert found.startswith("layers.7.weight differs")


# --- checksums -------------------------------------------------------------------------------------------------------


def naive_weight(place: int) -> int:
    """An odd number below 2^31, hashed from the place."""
    mixed = ((place % 2**31) * 0x9E3779B1 + place // 2**31) % 2**32
    mixed = ((mixed ^ (mixed >> 15)) % 2**31) * 0x85EBCA77 % 2**32
    return (mixed ^ (mixed >> 13)) % 2**31 | 1


def naive_checksum(tensor: torch.Tensor, width: int) -> int:
    """The documented formula, word by word: of word(i) * weight(column) * weight(2^40 + row), modulo 2^64."""
    _, _, data = content(tensor)
    data += bytes(-len(data) % 4)
    words = [int.from_bytes(data[at : at + 4], "little", signed=True) for at in range(0, len(data), 4)]
    return (
        sum(
            word * naive_weight(place % width) * naive_weight(2**40 + place // width)
            for place, word in enumerate(words)
        )
        % 2**64
    )


shapes = st.lists(st.integers(1, 6), max_size=4)


def tensor_of(shape: list[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random bits."""
    data = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=torch.Generator().manual_seed(seed))
    return data.to(torch.uint8).view(dtype).view(shape)


@given(
    shapes,
    st.sampled_from(DTYPES[:-1]),
    st.integers(0, 2**32),
    st.sampled_from([1, 3, 7, 1 << 16]),
    st.sampled_from([1, 2, 128]),
)
def test_a_checksum_is_the_documented_sum_whatever_is_hashed_at_a_time(shape, dtype, seed, width, rows):
    tensor = tensor_of(shape, dtype, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksums, "WIDTH", width)
        patch.setattr(checksums, "ROWS", rows)
        assert checksum(tensor) == naive_checksum(tensor, width)


def test_sums_of_many_large_words_are_taken_modulo_2_to_the_64th():
    words = torch.from_numpy(np.random.default_rng(0).integers(-(2**31), 2**31, 300_000, dtype=np.int32))
    weights = [checksums._weights(torch.arange(1 << 16) + far).numpy().astype(np.uint64) for far in (0, 1 << 40)]
    places = np.arange(len(words))
    with np.errstate(over="ignore"):
        products = words.numpy().astype(np.int64).astype(np.uint64) * weights[0][places % 2**16]
        expected = (products * weights[1][places // 2**16]).sum()
    assert checksum(words.view(torch.float32).view(300, 1000)) == int(expected)


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=50))
def test_weights_of_places_far_into_a_tensor_are_as_documented(places):
    assert checksums._weights(torch.tensor(places)).tolist() == [naive_weight(place) for place in places]


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4), st.sampled_from(DTYPES[:-1]), st.integers(0, 2**32), st.data()
)
def test_slices_along_any_dimension_are_compared_with_their_part_of_the_whole(shape, dtype, seed, data):
    """However they lie in memory, and on whichever byte they start."""
    tensor = tensor_of(shape, dtype, seed)
    dim = data.draw(st.integers(0, len(shape) - 1))
    cuts = sorted(data.draw(st.lists(st.integers(0, shape[dim]), max_size=3)))
    edges = list(itertools.pairwise([0, *cuts, shape[dim]]))

    def ranks(of: torch.Tensor) -> list[list[Piece]]:
        return [
            [piece_of("a", of.narrow(dim, start, end - start), shape, dim, start)]
            for start, end in edges
            if start < end
        ]

    assert differences([("a", tensor)], ranks(tensor)) == []
    changed = tensor.clone()
    changed.view(-1).view(torch.uint8)[data.draw(st.integers(0, tensor.nbytes - 1))] ^= 1
    (found,) = differences([("a", tensor)], ranks(changed))
    assert found.startswith("a differs (checksum ")


@given(shapes, st.sampled_from(DTYPES[:-1]), st.integers(0, 2**32), st.data())
def test_one_flipped_bit_anywhere_is_found(shape, dtype, seed, data):
    tensor = tensor_of(shape, dtype, seed)
    flipped = tensor.clone()
    raw = flipped.view(-1).view(torch.uint8)
    raw[data.draw(st.integers(0, raw.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert checksum(flipped) != checksum(tensor)


@given(st.lists(st.integers(2, 6), min_size=1, max_size=3), st.integers(0, 2**32), st.data())
def test_swapped_elements_are_found(shape, seed, data):
    tensor = tensor_of(shape, torch.int16, seed)
    flat = tensor.view(-1)
    a, b = (data.draw(st.integers(0, flat.numel() - 1)) for _ in range(2))
    swapped = flat.clone()
    swapped[a], swapped[b] = flat[b].item(), flat[a].item()
    assert (checksum(swapped.view(shape)) == checksum(tensor)) == bool(flat[a] == flat[b])


def test_negative_zero_and_other_nans_are_other_bits():
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    one, other = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert checksum(one[None]) != checksum(other[None])


def test_few_places_share_a_weight():
    """As with random odd numbers below 2^31: two places whose elements are swapped are then not told apart."""
    count = 1 << 20
    weights = checksums._weights(torch.arange(count))
    shared = count - len(weights.unique())
    assert shared < 2 * count**2 / 2 / 2**30


def pieces(tensors: dict[str, torch.Tensor]) -> list[Piece]:
    return [piece_of(name, tensor, tensor.shape) for name, tensor in tensors.items()]


def halves(name: str, tensor: torch.Tensor) -> list[list[Piece]]:
    half = tensor.shape[0] // 2
    return [[piece_of(name, tensor[half * r : half * (r + 1)], tensor.shape, 0, half * r)] for r in range(2)]


def describe(expected: dict[str, torch.Tensor], *ranks: list[Piece]) -> list[str]:
    return differences(expected.items(), ranks)


def test_differences_are_named_with_how():
    a, b = torch.arange(6.0).view(2, 3), torch.arange(8.0)
    held = pieces({"a": a, "b": b})
    assert describe({"a": a, "b": b}, held) == []
    assert describe({"a": a}, held) == ["b is held by the engine only"]
    assert describe({"a": a, "b": b, "c": b}, held) == ["c is not held by the engine"]
    assert describe({"a": a.view(3, 2), "b": b}, held) == ["a has shape [2, 3], not [3, 2]"]
    (found,) = describe({"a": a, "b": b + 1}, held)
    assert found.startswith("b differs (checksum ")


def test_what_the_engine_holds_in_another_type_is_compared_in_that_type():
    tensor = torch.randn(50)
    assert describe({"a": tensor}, pieces({"a": tensor.bfloat16()})) == []
    (found,) = describe({"a": tensor + 1}, pieces({"a": tensor.bfloat16()}))
    assert found.startswith("a differs")


def test_parts_of_several_ranks_and_copies_make_one_tensor():
    tensor = torch.randn(8, 3)
    first, second = halves("a", tensor)
    assert describe({"a": tensor}, first, second) == []
    assert describe({"a": tensor}, first, second, first, second) == []
    assert describe({"a": tensor}, first, first) == ["a is held in parts that do not add up to the whole"]
    stale = halves("a", tensor + 1)
    (found,) = describe({"a": tensor}, first, stale[1])
    assert found.startswith("a differs (checksum")
    assert describe({"a": tensor}, first, second, first, stale[1]) == [
        "a differs between the engine's ranks 1 and 3, which hold the same part of it"
    ]


def test_parts_that_overlap_leave_gaps_or_cross_do_not_make_up_a_tensor():
    tensor = torch.arange(16.0).view(4, 4)

    def held(*parts: tuple[int, int, int]) -> list[list[Piece]]:
        """(dim, start, end) of each rank."""
        return [[piece_of("a", tensor.narrow(dim, at, end - at), tensor.shape, dim, at)] for dim, at, end in parts]

    for parts in ([(0, 0, 2), (0, 1, 3)], [(0, 0, 2), (1, 0, 2)], [(0, 0, 1), (0, 2, 4)], [(0, 1, 4)], [(0, 0, 3)]):
        assert describe({"a": tensor}, *held(*parts)) == ["a is held in parts that do not add up to the whole"]
    beyond = Piece("a", (4, 4), 0, 3, 2, "float32", 0)
    assert describe({"a": tensor}, *held((0, 0, 2)), [beyond]) == ["a is held in parts that do not add up to the whole"]
    assert describe({"a": tensor}, *held((1, 2, 4), (1, 0, 2))) == []


def test_tensors_of_no_dimension_and_of_no_element_have_checksums_too():
    tensors = {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4), "hollow": torch.empty(4, 0)}
    assert describe(tensors, pieces(tensors)) == []
    assert checksum(torch.zeros(8, dtype=torch.bfloat16)[1:1]) == checksum(tensors["empty"]) == 0
    assert checksum(tensors["scalar"]) == naive_checksum(tensors["scalar"], checksums.WIDTH)
    (found,) = describe({**tensors, "scalar": torch.tensor(4.0)}, pieces(tensors))
    assert found.startswith("scalar differs")


def test_rows_and_columns_have_weights_of_their_own():
    """Of two words in mirrored places, which are swapped."""
    tensor = torch.arange(9, dtype=torch.int32)
    swapped = tensor.view(3, 3).T.contiguous().view(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksums, "WIDTH", 3)
        assert checksum(swapped) != checksum(tensor)


def test_no_more_memory_is_taken_than_a_few_rows_need(monkeypatch):
    tensor, most = torch.zeros(1000, 30), 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal most
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() != tensor.data_ptr():
                most = max(most, made.untyped_storage().nbytes())
            return made

    monkeypatch.setattr(checksums, "WIDTH", 64)
    monkeypatch.setattr(checksums, "ROWS", 4)
    with Sizes():
        checksum(tensor)
    assert 4 * 64 * 8 <= most < tensor.nbytes / 10
