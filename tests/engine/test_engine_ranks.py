"""The same numbers on 1, 2 and 4 ranks, whatever rows each has; checkpoints go from any number to any other."""

import errno
import resource
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from engine_helpers import ALL, LOSSES, build, largest_difference, make_table, weights_of
from forks import run_ranks

from verl.engine import CheckpointError, checkpoint
from verl.engine.compile import CompiledLayers
from verl.errors import UserError
from verl.plan import MicroBatching
from verl.rollout.embedded.unsharded_forward import UnshardedForward

ROWS = 9
EPS = 1e-5  # see test_engine_updates
# First row of each rank, and the end: ranks with many rows, with one, with none, with only an empty response.
CUTS = {1: (0, 9), 2: (0, 6, 9), 4: (0, 1, 6, 9, 9)}
LAYOUTS = [(2, -1), (4, -1), (4, 2)]
BATCHING = MicroBatching(2)


def share(rank: int, world_size: int):
    start, end = CUTS[world_size][rank : rank + 2]
    return make_table(ROWS).slice(start, end - start)


def numbers(engine, table, kind):
    if kind == "value":
        return [engine.values(table, batching=BATCHING).to_pylist()]
    found = engine.log_probs(table, temperature=0.7, batching=BATCHING)
    return [found["log_probs"].to_pylist(), found["entropy"].to_pylist()]


def plain(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def train(engine, table, kind, steps=3):
    return [engine.update(table, LOSSES[kind], batching=BATCHING) for _ in range(steps)]


def numbers_then_training(rank, world_size, path, kind, settings):
    engine, table = build(path, kind, eps=EPS, **settings), share(rank, world_size)
    before = numbers(engine, table, kind)
    return before, train(engine, table, kind), plain(weights_of(engine))


def one_process(path, kind, **settings):
    engine, table = build(path, kind, eps=EPS, **settings), make_table(ROWS)
    return numbers(engine, table, kind), train(engine, table, kind), weights_of(engine)


@pytest.mark.parametrize(("world_size", "fsdp_size"), LAYOUTS)
@pytest.mark.parametrize("kind", ["policy", "value"])
def test_numbers_and_updates_are_those_of_one_process(tiny, kind, world_size, fsdp_size):
    expected_numbers, expected_metrics, expected_weights = one_process(tiny, kind)
    settings = {"fsdp_size": fsdp_size, "checkpointing": world_size == 4}
    answers = run_ranks(world_size, numbers_then_training, tiny, kind, settings)
    for column, expected in enumerate(expected_numbers):
        found = [row for answer in answers for row in answer[0][column]]
        assert [len(row) for row in found] == [len(row) for row in expected]
        assert np.allclose(np.concatenate(found), np.concatenate(expected), rtol=1e-5, atol=1e-5)
    for _, metrics, weights in answers:
        for one, other in zip(metrics, expected_metrics, strict=True):
            assert one == {key: pytest.approx(value, rel=1e-5, abs=1e-6) for key, value in other.items()}
        weights = {name: torch.from_numpy(array) for name, array in weights.items()}
        assert largest_difference(weights, expected_weights) < 1e-5


def test_bfloat16_with_sharded_masters_follows_one_process(tiny):
    _, expected_metrics, expected = one_process(tiny, "policy", dtype="bfloat16")
    _, metrics, weights = run_ranks(2, numbers_then_training, tiny, "policy", {"dtype": "bfloat16"})[0]
    assert [each["loss"] for each in metrics] == pytest.approx([each["loss"] for each in expected_metrics], abs=0.02)
    assert all(np.allclose(array, expected[name].float(), atol=0.02) for name, array in weights.items())


@pytest.mark.parametrize("kind", ["policy", "value"])
def test_a_model_whose_files_are_bfloat16_is_sharded_in_float32_all_through(tiny, tmp_path, kind):
    transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(tmp_path)
    _, expected, _ = one_process(str(tmp_path), kind)
    _, metrics, _ = run_ranks(2, numbers_then_training, str(tmp_path), kind, {})[0]
    assert [each["loss"] for each in metrics] == pytest.approx([each["loss"] for each in expected], rel=1e-5)


def compiled(rank, world_size, path, packed):
    torch.compile = partial(torch.compile, backend="aot_eager")  # all of the compiler but code for the device
    engine, table = build(path, eps=EPS, checkpointing=True, packed=packed), share(rank, world_size)
    engine._layers = CompiledLayers(engine.module, checkpointing=True)
    assert len(engine._layers._forwards) == 2
    return numbers(engine, table, "policy"), train(engine, table, "policy"), plain(weights_of(engine))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_compiled_layers_train_alike_under_sharding(tiny, packed):
    _, expected_metrics, expected = one_process(tiny, "policy")
    _, metrics, weights = run_ranks(2, compiled, tiny, packed)[0]
    assert [each["loss"] for each in metrics] == pytest.approx([each["loss"] for each in expected_metrics], rel=1e-4)
    assert largest_difference({k: torch.from_numpy(v) for k, v in weights.items()}, expected) < 1e-4


def numbers_of_modules(rank, world_size, path):
    """That compiled code takes as inputs that may change."""
    found, compiled = [], torch.compile

    def backend(graph, inputs):
        symbols = [node.name for node in graph.graph.nodes if isinstance(node.meta.get("example_value"), torch.SymInt)]
        found.append([name for name in symbols if name.startswith("l_self_")])
        return graph

    torch.compile = partial(compiled, backend=backend)
    engine, table = build(path, eps=EPS, packed=True), share(rank, world_size)
    engine._layers = CompiledLayers(engine.module)
    torch.compile = compiled
    numbers(engine, table, "policy")
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_compiled_code_knows_the_sizes_that_modules_hold(tiny, ranks):
    """The size of a head among them: elements would be found by dividing by it, which takes its time on a GPU."""
    for found in run_ranks(ranks, numbers_of_modules, tiny):
        assert found
        assert not any(found), found


def untied_without_resharding(rank, world_size, path):
    engine, table = build(path, eps=EPS, reshard_after_forward=False), share(rank, world_size)
    metrics = train(engine, table, "policy")
    engine._copies.moves = True  # as between a GPU and the host
    engine.offload(params=True, optimizer=True)
    engine.onload(params=True, optimizer=True)
    return metrics + train(engine, table, "policy"), plain(weights_of(engine))


def test_untied_embeddings_kept_whole_and_offloaded_in_between_train_alike(any_tiny):
    engine = build(any_tiny, eps=EPS)
    expected = train(engine, make_table(ROWS), "policy", 6)
    metrics, weights = run_ranks(2, untied_without_resharding, any_tiny)[0]
    assert [each["loss"] for each in metrics] == pytest.approx([each["loss"] for each in expected], rel=1e-4)
    assert largest_difference({k: torch.from_numpy(v) for k, v in weights.items()}, weights_of(engine)) < 1e-4


def gathered(rank, world_size, path, reshard):
    """What training gives, and how often FSDP gathered in log-probs and in an update."""
    engine, table = build(path, eps=EPS, reshard_after_forward=reshard), share(rank, world_size)
    results, counts = [], []
    for work in (numbers, train):
        with torch.profiler.profile() as profile:
            results.append(work(engine, table, "policy"))
        counts.append(sum(event.name == "c10d::_allgather_base_" for event in profile.events()))
    return results, plain(weights_of(engine)), counts


def test_weights_that_are_kept_whole_are_gathered_once_a_stage_and_train_bitwise_alike(tiny):
    """Two layers and the root, three micro-batches; forwards and backwards gather a layer of their own."""
    kept, freed = (run_ranks(2, gathered, tiny, reshard) for reshard in (False, True))
    for (results, weights, counts), (expected, same, more) in zip(kept, freed, strict=True):
        assert results == expected
        assert all(np.array_equal(array, same[name]) for name, array in weights.items())
        assert counts == [3, 3 * 3]
        assert more == [3 * 2 + 1, 3 * 3 * (2 * 2 + 1)]


def in_stages(rank, world_size, path, moves):
    """As a PPO step has them: log-probs, which change nothing, then an update."""
    engine, table = build(path, eps=EPS, dtype="bfloat16"), share(rank, world_size)
    engine._copies.moves = moves
    found = []
    for _ in range(3):
        for work in (numbers, partial(train, steps=1)):
            engine.offload(params=True, optimizer=True)
            engine.onload(params=True, optimizer=True)
            found.append(work(engine, table, "policy"))
    return found, plain(weights_of(engine))


def test_shards_that_are_elsewhere_between_stages_train_bitwise_as_those_that_stay(tiny):
    """Of the 97 words of the vocabulary one rank has one less, which FSDP pads."""
    moved, still = (run_ranks(2, in_stages, tiny, moves) for moves in (True, False))
    for (found, weights), (expected, same) in zip(moved, still, strict=True):
        assert found == expected
        assert all(np.array_equal(array, same[name]) for name, array in weights.items())


def poisoned_on_one_rank(rank, world_size, path):
    engine, table = build(path), share(rank, world_size)
    before = plain(weights_of(engine))

    def loss_fn(outputs, batch):
        loss, metrics = LOSSES["policy"](outputs, batch)
        return loss * (float("nan") if rank == 1 else 1.0), metrics

    skipped = engine.update(table, loss_fn, batching=BATCHING)["skipped"]
    after = plain(weights_of(engine))
    clean = engine.update(table, LOSSES["policy"], batching=BATCHING)["skipped"]
    return skipped, clean, all(np.array_equal(before[name], after[name]) for name in before)


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(tiny):
    assert run_ranks(2, poisoned_on_one_rank, tiny) == [(1.0, 0.0, True)] * 2


# ---- checkpoints


def train_and_save(rank, world_size, path, folder, kind, dtype, file_bytes=checkpoint.FILE):
    checkpoint.FILE = file_bytes
    engine = build(path, kind, dtype=dtype, eps=EPS)
    train(engine, share(rank, world_size), kind)
    engine.step_schedule()
    engine.save(folder)
    return plain(weights_of(engine))


def load_and_train(rank, world_size, path, folder, kind, dtype, fsdp_size):
    engine = build(path, kind, dtype=dtype, eps=EPS, fsdp_size=fsdp_size, seed=5)
    engine.load(folder)
    loaded = plain(weights_of(engine))
    return loaded, train(engine, share(rank, world_size), kind)


@pytest.mark.parametrize(("kind", "dtype"), [("policy", "float32"), ("value", "bfloat16")])
def test_a_checkpoint_of_two_ranks_goes_on_on_one_two_and_four(tiny, tmp_path, kind, dtype):
    folder = tmp_path / "checkpoint"
    saved = run_ranks(2, train_and_save, tiny, folder, kind, dtype, 50_000)[0]
    assert len(list(folder.glob("*.safetensors"))) > 5
    losses = {}
    for world_size, fsdp_size in LAYOUTS if kind == "policy" else LAYOUTS[1:2]:
        for loaded, metrics in run_ranks(world_size, load_and_train, tiny, folder, kind, dtype, fsdp_size):
            assert all(np.array_equal(loaded[name], saved[name]) for name in saved)
            losses[world_size, fsdp_size] = [each["loss"] for each in metrics]
    engine = build(tiny, kind, dtype=dtype, eps=EPS, seed=5)
    engine.load(folder)
    assert all(np.array_equal(tensor.float().numpy(), saved[name]) for name, tensor in weights_of(engine).items())
    alone = [each["loss"] for each in train(engine, make_table(ROWS), kind)]
    tolerance = {"rel": 1e-4} if dtype == "float32" else {"abs": 0.02}
    assert all(each == pytest.approx(alone, **tolerance) for each in losses.values())


def test_a_checkpoint_without_one_rank_s_file_is_refused(tiny, tmp_path):
    """DCP would load the rest and leave that part of every tensor as it was."""
    for lost in (0, 1):
        folder = tmp_path / str(lost)
        run_ranks(2, train_and_save, tiny, folder, "policy", "float32")
        sorted(Path(folder).glob("*.safetensors"))[lost].unlink()
        with pytest.raises(CheckpointError, match=str(folder)):
            build(tiny).load(folder)


def continue_straight(rank, world_size, path, folder, saves):
    engine, table = build(path), share(rank, world_size)
    metrics = train(engine, table, "policy")
    if saves:
        engine.save(folder)
        engine = build(path)
        engine.load(folder)
    return metrics + train(engine, table, "policy"), plain(weights_of(engine))


def test_on_the_same_ranks_a_resumed_run_is_bitwise_the_uninterrupted_one(tiny, tmp_path):
    straight = run_ranks(2, continue_straight, tiny, tmp_path, False)
    resumed = run_ranks(2, continue_straight, tiny, tmp_path, True)
    for (metrics, weights), (other_metrics, other_weights) in zip(straight, resumed, strict=True):
        assert metrics == other_metrics
        assert all(np.array_equal(weights[name], other_weights[name]) for name in weights)


def export(rank, world_size, path, folder):
    engine = build(path)
    train(engine, share(rank, world_size), "policy")
    engine.export_hf(folder)
    return plain(weights_of(engine))


def test_an_export_from_two_ranks_is_a_model_that_an_engine_loads(any_tiny, tmp_path):
    weights = run_ranks(2, export, any_tiny, tmp_path)[0]
    loaded = weights_of(build(str(tmp_path)))
    assert loaded.keys() == weights.keys()
    assert all(np.array_equal(loaded[name].numpy(), weights[name]) for name in weights)


def export_while_whole(rank, world_size, path, folder):
    engine = build(path)
    with UnshardedForward(engine.module, engine.root, reshard_after_forward=True).unsharded():
        engine.export_hf(folder)


def test_a_model_that_a_rollout_holds_whole_is_not_exported(tiny, tmp_path):
    with pytest.raises(RuntimeError, match=r"embed_tokens.weight is whole.*a rollout that borrows the model"):
        run_ranks(2, export_while_whole, tiny, tmp_path)


def test_an_fsdp_size_that_does_not_divide_the_ranks_is_refused(tiny):
    with pytest.raises(RuntimeError, match="fsdp_size=3 does not divide the 4 ranks"):
        run_ranks(4, numbers_then_training, tiny, "policy", {"fsdp_size": 3})


def what_building_says(rank, world_size, path):
    with pytest.raises(UserError) as error:
        build(path)
    return str(error.value)


def test_a_model_that_only_the_first_rank_reads_and_finds_damaged_is_named_by_every_rank(tiny, tmp_path):
    transformers.AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    first, second = run_ranks(2, what_building_says, str(tmp_path))
    assert first == second
    assert f"model.path={tmp_path} could not be loaded" in first


def save_on_a_full_disk(rank, world_size, path, folder):
    engine = build(path)
    if rank == world_size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # bytes a file may have
    with pytest.raises(OSError) as error:
        engine.save(folder)
    return error.value.errno


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_disk_that_is_full_on_one_rank_is_an_os_error_on_all(tiny, tmp_path, world_size):
    assert run_ranks(world_size, save_on_a_full_disk, tiny, tmp_path / "full") == [errno.EFBIG] * world_size


def test_rows_need_not_be_batched_alike_on_every_rank(tiny):
    found = run_ranks(2, unequal_batching, tiny)
    engine = build(tiny, eps=EPS)
    expected = engine.update(make_table(ROWS), LOSSES["policy"], batching=ALL)
    assert found[0] == found[1] == {key: pytest.approx(value, rel=1e-5, abs=1e-6) for key, value in expected.items()}


def unequal_batching(rank, world_size, path):
    batching = MicroBatching(max_tokens=12) if rank == 0 else ALL
    return build(path, eps=EPS).update(share(rank, world_size), LOSSES["policy"], batching=batching)
