"""Loading, weights, offload and checkpoints in one process."""

import errno
import json
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers
from engine_helpers import ALL, LOSSES, build, largest_difference, make_table, policy_loss, state_of, weights_of
from safetensors.torch import load_file

from verl.engine import CheckpointError, offload
from verl.errors import UserError
from verl.machine import HostMemory
from verl.plan import MicroBatching


def updates(engine, count, kind="policy"):
    return [engine.update(make_table(), LOSSES[kind], batching=MicroBatching(3)) for _ in range(count)]


# ---- loading


@pytest.mark.parametrize("path", ["/no/such/model", "./no-such-model", "~/no-such-model"])
def test_a_path_that_does_not_exist_is_named(path):
    with pytest.raises(UserError, match=f"model.path={path} does not exist"):
        build(path)


def test_a_folder_that_is_not_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match=r"has no config.json"):
        build(str(tmp_path))


def test_a_hub_model_that_cannot_be_fetched_is_named():
    with pytest.raises(UserError, match=r"model.path=no-such/model could not be loaded"):
        build("no-such/model")


@pytest.mark.parametrize("damage", ["no weights", "weights cut short", "config is not JSON", "unknown architecture"])
def test_a_damaged_model_is_named(tiny, tmp_path, damage):
    transformers.AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    match damage:
        case "no weights":
            weights.unlink()
        case "weights cut short":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "config is not JSON":
            config.write_text("{")
        case "unknown architecture":
            config.write_text(json.dumps({"model_type": "no_such_architecture"}))
    with pytest.raises(UserError, match=f"model.path={tmp_path} could not be loaded"):
        build(str(tmp_path))


def test_weights_that_the_files_lack_are_named_not_drawn(tiny, tmp_path):
    hf = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    state = hf.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    hf.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match=r"lack model.layers.1.mlp.up_proj.weight \(1 tensors"):
        build(str(tmp_path))


def test_override_config_reaches_the_model(tiny):
    assert build(tiny, override_config={"rms_norm_eps": 0.5}).module.config.rms_norm_eps == 0.5


def test_an_override_that_the_config_does_not_have_is_named(tiny):
    with pytest.raises(UserError, match="has no rms_norm_epsilon"):
        build(tiny, override_config={"rms_norm_epsilon": 0.5})


def test_a_model_that_changes_its_logits_after_the_head_is_refused(tiny, tmp_path):
    transformers.AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"logits_scaling": 2.0}))
    with pytest.raises(UserError, match=r"logits_scaling=2.0 is not supported"):
        build(str(tmp_path))


# ---- weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_have_the_names_and_values_of_the_model_s_own_files(any_tiny, dtype):
    saved = load_file(f"{any_tiny}/model.safetensors")
    weights = dict(build(any_tiny, dtype=dtype).weights())
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], tensor.to(getattr(torch, dtype))) for name, tensor in saved.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["policy", "value"])
def test_an_export_is_a_model_that_transformers_loads(any_tiny, tmp_path, kind, dtype):
    engine = build(any_tiny, kind, dtype=dtype)
    updates(engine, 2, kind)
    engine.export_hf(tmp_path)
    auto = transformers.AutoModelForCausalLM if kind == "policy" else transformers.AutoModelForTokenClassification
    hf = auto.from_pretrained(tmp_path)
    assert hf.dtype == getattr(torch, dtype)
    assert largest_difference(weights_of(engine), dict(hf.named_parameters())) == 0


# ---- offload


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offload_and_onload_leave_training_bitwise_as_it_was(tiny, dtype):
    moved, still = build(tiny, dtype=dtype), build(tiny, dtype=dtype)
    moved._copies.moves = True  # as between a GPU and the host
    for _ in range(3):
        moved.offload(params=True, optimizer=True)
        moved.onload(params=True)
        moved.onload(params=True, optimizer=True)
        assert updates(moved, 1) == updates(still, 1)
    assert largest_difference(weights_of(moved), weights_of(still)) == 0


def test_only_what_has_changed_is_copied_back_to_the_host(tiny, tmp_path, monkeypatch):
    engine = build(tiny, dtype="bfloat16")
    engine._copies.moves = True
    engine.save(tmp_path)
    first = weights_of(engine)
    copied = []
    to_host = engine._copies.to_host
    monkeypatch.setattr(engine._copies, "to_host", lambda *tensors: (copied.append(tensors[0]), to_host(*tensors))[1])

    def copies(between, pieces: int = 2) -> int:
        """Bytes that are copied after a stage, of parameters and of the optimizer's state, in so many pieces."""
        copied.clear()
        engine.onload(params=True, optimizer=True)
        between()
        engine.offload(params=True, optimizer=True)
        assert len(copied) in (0, pieces)
        return sum(-(-tensor.nbytes // offload.ALIGNMENT) * offload.ALIGNMENT for tensor in copied)

    tensors = len(engine._params._tensors) + len(engine._state._tensors)
    whole = copies(lambda: None, pieces=tensors)  # which had no place on the host yet, and lay apart on the device
    assert whole > 3 * sum(tensor.nbytes for tensor in first.values())
    assert copies(lambda: engine.log_probs(make_table(), temperature=1.0, batching=ALL)) == 0
    assert copies(lambda: updates(engine, 1)) == whole
    engine.onload(params=True)
    assert largest_difference(weights_of(engine), first) > 0
    assert copies(lambda: engine.load(tmp_path)) == whole
    engine.onload(params=True)
    assert largest_difference(weights_of(engine), first) == 0
    engine.onload(optimizer=True)
    assert updates(engine, 2) == updates(build(tiny, dtype="bfloat16"), 2)


def test_parameters_that_are_needed_next_are_copied_while_they_stay(tiny, monkeypatch):
    engine, still = build(tiny), build(tiny)
    engine._copies.moves = True
    for _ in range(3):
        engine.offload(params=True, optimizer=True)
        engine.onload(params=True, optimizer=True)
        assert updates(engine, 1) == updates(still, 1)
        engine.copy_to_host()
        assert largest_difference(weights_of(engine), weights_of(still)) == 0
        with monkeypatch.context() as patch:
            patch.setattr(engine._copies, "to_host", None)
            engine.offload(params=True)
    engine.onload(params=True)
    assert largest_difference(weights_of(engine), weights_of(still)) == 0


bits = torch.arange(1024, dtype=torch.int32).view(torch.uint8)


@pytest.mark.parametrize("on_host", [[(0, 8), (16, 8), (64, 100), (164, 4)], [(64, 4), (128, 4), (0, 4), (4, 4)]])
@pytest.mark.parametrize("on_device", [[(8, 8), (24, 8), (72, 100), (172, 4)], [(0, 8), (16, 8), (80, 100), (256, 4)]])
def test_tensors_that_lie_alike_are_copied_together_and_nothing_else_is(on_host, on_device):
    """As (start, bytes) of each; the sizes are those on the host."""
    memory, places = bits.clone(), torch.zeros(1024, dtype=torch.uint8)
    tensors = [memory[at : at + size].view(torch.int16) for (at, _), (_, size) in zip(on_device, on_host, strict=True)]
    homes = [places[at : at + size].view(torch.int16) for at, size in on_host]
    rows = list(zip(tensors, homes, strict=True))
    runs = list(offload.spans(rows))
    assert sum(len(run[0]) for run in runs) == len(rows)
    steps = [(b[0] - a[0], d[0] - c[0]) for (a, b), (c, d) in zip(pairwise(on_device), pairwise(on_host), strict=True)]
    assert len(runs) == 1 + sum(there != here or here < 0 for there, here in steps)
    for sources, targets in runs:
        for part, source in zip(offload.split_like(offload.span(sources).clone(), sources), sources, strict=True):
            assert part.dtype == source.dtype
            assert torch.equal(part, source)
        offload.span(targets).copy_(offload.span(sources))
    assert all(torch.equal(tensor, home) for tensor, home in rows)


def test_tensors_of_other_storages_without_elements_or_in_another_order_are_copied_one_by_one():
    own = [torch.ones(4), torch.ones(0), torch.ones(4)]
    table = torch.ones(4, 4)
    for tensors in (
        own,
        [table[0], table[1:1], table[1]],
        [table[1], table[0]],
        [table[0], table[0]],
        [table[:, 0], table[:, 2]],
    ):
        assert [len(run) for (run,) in offload.spans((tensor,) for tensor in tensors)] == [1] * len(tensors)


def test_what_a_broken_off_update_has_changed_is_not_lost_on_the_host(tiny, monkeypatch):
    engine = build(tiny)
    engine._copies.moves = True
    for _ in range(2):
        engine.offload(params=True, optimizer=True)
        engine.onload(params=True, optimizer=True)
    first, step = weights_of(engine), engine.optimizer.step

    def breaks_off(*args):
        step(*args)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(engine.optimizer, "step", breaks_off)
    with pytest.raises(torch.OutOfMemoryError):
        updates(engine, 1)
    stepped = weights_of(engine)
    assert largest_difference(stepped, first) > 0
    engine.offload(params=True, optimizer=True)
    engine.onload(params=True, optimizer=True)
    assert largest_difference(weights_of(engine), stepped) == 0


def test_places_on_the_host_are_of_the_tensors_shapes_apart_and_always_the_same(monkeypatch):
    monkeypatch.setattr(offload, "PIECE", 256)
    tensors = [
        torch.zeros(0, 4),
        torch.randn(3, 5),
        torch.randn(70),
        torch.zeros(0, 4),
        torch.ones(()),
        torch.arange(9),
    ]
    places = offload.HostBuffers(tensors)
    for tensor, place in zip(tensors, places, strict=True):
        place.copy_(tensor)
    for tensor, place in zip(tensors, places, strict=True):
        assert place.dtype == tensor.dtype
        assert torch.equal(place, tensor)


class Runtime:
    """Stands for CUDA's: pins as many pieces as it is told. pinned: the addresses that are, now."""

    def __init__(self, pieces: int):
        self.left, self.pinned = pieces, set()

    def cudaHostRegister(self, address, nbytes, flags):  # noqa: N802
        if not self.left:
            return 2
        self.left -= 1
        self.pinned.add(address)
        return 0

    def cudaHostUnregister(self, address):  # noqa: N802
        self.pinned.remove(address)

    def cudaGetErrorString(self, status):  # noqa: N802
        return {2: "out of memory"}[status]


@pytest.fixture
def runtime(monkeypatch) -> Runtime:
    """Of a machine with a GPU, and memory for three pieces of 100 kB."""
    found = Runtime(pieces=3)
    monkeypatch.setattr(offload, "PIECE", 100_000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    memory = HostMemory(available=3 * 10**9, total=64 * 10**9)
    monkeypatch.setattr(offload, "host_memory", lambda: memory)
    return found


def moving(count: int, loaded: bool = True) -> offload.MovableTensors:
    """Tensors of 80 kB each."""
    copies = offload.Copies(torch.device("cpu"))
    copies.moves = True  # as between a GPU and the host
    return offload.MovableTensors([torch.ones(20_000) for _ in range(count)], copies, loaded)


def test_memory_that_cannot_be_pinned_is_refused_with_the_amounts_and_the_keys(runtime):
    tensors = moving(10)
    with pytest.raises(UserError) as error:
        tensors.offload()
    said = str(error.value)
    assert re.match(r"0 MB of host memory could not be pinned \(out of memory\), of 1 MB that", said)
    assert "has 3.0 GB available of 64.0 GB" in said
    assert "param_offload or optimizer_offload" in said


@pytest.mark.parametrize("loaded", [True, False], ids=["moved later", "made on the host"])
def test_nothing_stays_pinned_where_not_all_of_it_could_be(runtime, loaded):
    with pytest.raises(UserError):
        moving(10, loaded).offload()
    assert runtime.left == 0
    assert not runtime.pinned


def test_memory_is_pinned_once_until_it_is_closed(runtime):
    tensors = moving(3)
    for _ in range(3):
        tensors.offload()
        tensors.onload()
    assert len(runtime.pinned) == 3
    tensors.close()
    assert not runtime.pinned


@pytest.mark.parametrize(("limit", "count"), [(-1, 0), (0, 0), (79_999, 0), (80_000, 1), (170_000, 2), (10**9, 3)])
def test_as_many_tensors_come_to_the_device_as_there_is_room_for(runtime, limit, count):
    tensors = moving(3, loaded=False)
    places = [tensor.data_ptr() for tensor in tensors._tensors]
    tensors.onload(limit)
    assert (tensors.loaded_bytes, tensors.loaded) == (80_000 * count, count == 3)
    assert [tensor.data_ptr() == place for tensor, place in zip(tensors._tensors, places, strict=True)] == (
        [False] * count + [True] * (3 - count)
    )
    for number, tensor in enumerate(tensors._tensors):
        tensor += number
    tensors.changed = True
    tensors.onload(0)
    assert tensors.loaded_bytes == 80_000 * count
    tensors.offload()
    assert [tensor.data_ptr() for tensor in tensors._tensors] == places
    assert [float(tensor[0]) for tensor in tensors._tensors] == [1.0, 2.0, 3.0]


def test_the_room_for_an_optimizers_state_is_what_updates_have_left_of_the_device(tiny, monkeypatch):
    monkeypatch.setattr("verl.engine.engine.SPARE", 100)
    engine = build(tiny)
    state = engine._state.loaded_bytes
    monkeypatch.setattr(engine, "_device_bytes", lambda: 10 * state)
    engine._copies.moves = True
    engine.offload(optimizer=True)
    engine._measure_optimizer_room(peak=3 * state)
    assert engine._state_room == 7 * state - 100
    engine.onload(optimizer=True)
    assert engine._state.loaded
    engine._measure_optimizer_room(peak=4 * state)  # of which one is its own
    assert engine._state_room == 7 * state - 100
    engine._measure_optimizer_room(peak=10 * state)
    engine._measure_optimizer_room(peak=2 * state)  # an update may be as large again
    assert engine._state_room == state - 100
    engine.offload(optimizer=True)
    engine.onload(optimizer=True)
    assert 0 < engine._state.loaded_bytes < state
    metrics = updates(engine, 2)
    assert metrics == updates(build(tiny), 2)


def test_memory_that_the_host_does_not_give_is_refused_likewise(runtime, monkeypatch):
    def refuse(fileno, length):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(offload.mmap, "mmap", refuse)
    with pytest.raises(UserError, match=r"could not be pinned \(Cannot allocate memory\)"):
        moving(1).offload()


def test_on_a_cpu_nothing_is_moved(tiny):
    engine = build(tiny)
    where = [param.data_ptr() for param in engine.root.parameters()]
    engine.offload(params=True, optimizer=True)
    assert [param.data_ptr() for param in engine.root.parameters()] == where


@pytest.mark.parametrize("bucket", [1, 20_000, 1 << 30])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_state_that_stays_on_the_host_passes_through_the_device_bitwise_as_if_it_were_there(
    tiny, tmp_path, monkeypatch, dtype, bucket
):
    monkeypatch.setattr("verl.engine.optim.BUCKET", bucket)
    on_host, still = build(tiny, dtype=dtype), build(tiny, dtype=dtype)
    on_host._copies.moves = True
    on_host.offload(optimizer=True)
    assert updates(on_host, 3) == updates(still, 3)
    assert largest_difference(weights_of(on_host), weights_of(still)) == 0
    states = state_of(on_host, tmp_path / "host"), state_of(still, tmp_path / "device")
    assert largest_difference(*states) == 0


def test_work_on_what_is_offloaded_is_refused_with_what_to_do(tiny):
    engine = build(tiny)
    engine.offload(params=True)
    for work in (
        lambda: engine.log_probs(make_table(), temperature=1.0, batching=ALL),
        lambda: updates(engine, 1),
        lambda: list(engine.weights()),
    ):
        with pytest.raises(RuntimeError, match=r"onload\(params=True\)"):
            work()


def test_a_closed_engine_does_no_work_and_closing_twice_is_no_error(tiny):
    engine = build(tiny)
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError):
        engine.log_probs(make_table(), temperature=1.0, batching=ALL)


# ---- checkpoints


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["policy", "value"])
def test_three_updates_saved_loaded_and_three_more_are_bitwise_six(tiny, tmp_path, kind, dtype):
    def fresh(seed):
        return build(tiny, kind, dtype=dtype, seed=seed, lr_scheduler_type="cosine", total_steps=6)

    def iterations(engine):
        metrics = []
        for _ in range(3):
            metrics += updates(engine, 1, kind)
            engine.step_schedule()
        return metrics

    straight, first, second = fresh(0), fresh(0), fresh(1)
    expected = iterations(straight) + iterations(straight)
    metrics = iterations(first)
    first.save(tmp_path / "checkpoint")
    second.load(tmp_path / "checkpoint")
    assert metrics + iterations(second) == expected
    end = state_of(straight, tmp_path / "straight")
    assert largest_difference(state_of(second, tmp_path / "second"), end) == 0
    assert largest_difference(weights_of(second), weights_of(straight)) == 0


def test_a_checkpoint_holds_float32_masters_and_no_pickle(tiny, tmp_path):
    engine = build(tiny, dtype="bfloat16", lr=1e-6)
    updates(engine, 3)
    state = state_of(engine, tmp_path)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(state[f"model.{name}"], state[f"model.{name}"].bfloat16().float())
    assert {file.suffix for file in tmp_path.rglob("*") if file.is_file()} == {".safetensors", ".json"}


def test_a_checkpoint_in_many_files_is_that_in_one(tiny, tmp_path, monkeypatch):
    engine, other = build(tiny), build(tiny)
    updates(engine, 2)
    whole = state_of(engine, tmp_path / "one")
    monkeypatch.setattr("verl.engine.checkpoint.FILE", 50_000)
    in_parts = state_of(engine, tmp_path / "many")
    sizes = [file.stat().st_size for file in (tmp_path / "many").glob("*.safetensors")]
    assert len(sizes) > 5
    assert max(sizes) < 70_000  # with the header
    assert largest_difference(whole, in_parts) == 0
    other.load(tmp_path / "many")
    assert updates(engine, 1) == updates(other, 1)


def test_an_offloaded_engine_saves_and_loads(tiny, tmp_path):
    engine, other = build(tiny, dtype="bfloat16"), build(tiny, dtype="bfloat16")
    updates(engine, 2)
    for each in (engine, other):
        each.offload(params=True, optimizer=True)
    engine.save(tmp_path)
    other.load(tmp_path)
    for each in (engine, other):
        each.onload(params=True, optimizer=True)
    assert updates(engine, 1) == updates(other, 1)


@pytest.mark.parametrize("damage", ["cut short", "header", "tensors missing", "state missing", "state not JSON"])
def test_a_damaged_checkpoint_is_named(tiny, tmp_path, damage):
    build(tiny).save(tmp_path)
    (tensors,), state = tmp_path.glob("*.safetensors"), tmp_path / "engine.json"
    match damage:
        case "cut short":
            tensors.write_bytes(tensors.read_bytes()[:-1000])
        case "header":
            tensors.write_bytes(b"\xff" * 64 + tensors.read_bytes()[64:])
        case "tensors missing":
            tensors.unlink()
        case "state missing":
            state.unlink()
        case "state not JSON":
            state.write_text("{")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        build(tiny).load(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(tiny, any_tiny, tmp_path):
    build(tiny, "value").save(tmp_path)
    build(tiny).save(tmp_path / "policy")
    with pytest.raises(CheckpointError, match=r"it lacks .*score"):
        build(tiny, "value").load(tmp_path / "policy")
    config = transformers.AutoConfig.from_pretrained(tiny, num_hidden_layers=1)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "one_layer")
    build(str(tmp_path / "one_layer")).save(tmp_path / "small")
    with pytest.raises(CheckpointError, match=r"it lacks .*layers\.1"):
        build(tiny).load(tmp_path / "small")


def test_loading_leaves_an_engine_that_predicts_as_the_saved_one(tiny, tmp_path):
    engine, reference = build(tiny), build(tiny, trained=False)
    updates(engine, 3)
    engine.save(tmp_path)
    reference.load(tmp_path)
    one, two = (each.log_probs(make_table(), temperature=1.0, batching=ALL) for each in (engine, reference))
    assert one == two
    assert np.concatenate(one["log_probs"].to_pylist()).size > 0


def test_policy_loss_goes_down(tiny):
    engine = build(tiny)
    losses = [engine.update(make_table(), policy_loss, batching=ALL)["loss"] for _ in range(10)]
    assert losses[-1] < losses[0] - 1
