"""What compiled layers compute, and compute again, in an update; by torch's compiler without code for a device."""

from functools import partial

import pytest
import torch
from engine_helpers import build, largest_difference, make_table, policy_loss, weights_of
from torch.profiler import ProfilerActivity, profile

from verl.engine.compile import CompiledLayers
from verl.plan import MicroBatching

LAYERS = 2
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


def update(engine) -> dict[str, float]:
    return engine.update(make_table(), policy_loss, batching=MicroBatching(100), temperature=0.7)


def operators(engine) -> dict[str, int]:
    """How often each is called in an update."""
    update(engine)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        update(engine)
    return {event.key: event.count for event in found.key_averages()}


def compiled(path, checkpointing: bool):
    engine = build(path, checkpointing=checkpointing)
    engine._layers = CompiledLayers(engine.module, checkpointing)
    return engine


def test_attention_is_computed_once_and_the_last_product_of_a_layer_not_again(tiny, backend):
    plain, kept, again = (
        operators(each) for each in (compiled(tiny, False), compiled(tiny, True), build(tiny, checkpointing=True))
    )
    assert plain[ATTENTION] == kept[ATTENTION] == LAYERS
    assert again[ATTENTION] == 2 * LAYERS
    products = {
        name: found["aten::mm"] + found.get("aten::addmm", 0) for name, found in (("plain", plain), ("kept", kept))
    }
    assert products["kept"] - products["plain"] == LAYERS * 6  # of q, k, v, o, gate, up and down: not down


@pytest.mark.parametrize("checkpointing", [False, True])
def test_updates_of_compiled_layers_are_those_of_plain_ones(tiny, backend, checkpointing):
    engines = compiled(tiny, checkpointing), build(tiny)
    found, expected = ([update(engine) for _ in range(3)] for engine in engines)
    for one, other in zip(found, expected, strict=True):
        assert one == {key: pytest.approx(value, rel=1e-5, abs=1e-6) for key, value in other.items()}
    assert largest_difference(*map(weights_of, engines)) < 1e-5


def test_outside_of_the_engines_forwards_the_layers_are_as_they_were(tiny, backend):
    engine = compiled(tiny, True)
    forwards = [layer.forward for layer, _ in engine._layers._forwards]
    update(engine)
    assert [layer.forward for layer, _ in engine._layers._forwards] == forwards
    assert not any("forward" in vars(layer) for layer, _ in engine._layers._forwards)


def test_a_layer_that_cannot_be_compiled_as_a_whole_is_computed_again_in_pieces(tiny, backend):
    def broken(path, checkpointing):
        engine = build(path, checkpointing=checkpointing)
        for layer in engine.module.base_model.layers:
            layer.mlp.register_forward_hook(lambda *_: torch._dynamo.graph_break())
        engine._layers = CompiledLayers(engine.module, checkpointing)
        return engine

    engines = broken(tiny, True), build(tiny)
    torch._dynamo.utils.counters.clear()
    with pytest.warns(UserWarning, match="Qwen2DecoderLayer cannot be compiled as a whole"):
        found = [update(engines[0])]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= 2  # what comes before the break and what comes after
    found += [update(engines[0]) for _ in range(2)]
    expected = [update(engines[1]) for _ in range(3)]
    for one, other in zip(found, expected, strict=True):
        assert one == {key: pytest.approx(value, rel=1e-5, abs=1e-6) for key, value in other.items()}
    counts = operators(engines[0])
    assert counts[ATTENTION] == 2 * LAYERS
