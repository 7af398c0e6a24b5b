"""The training engine as it runs on a GPU: packed, compiled, logits in blocks, its optimizer at times on the host."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from cuda_helpers import BATCHING, loss, save_model, table

from verl.config.sections.parts import FSDPConfig, ModelConfig, OptimConfig
from verl.engine import TrainEngine
from verl.engine.token_statistics import token_statistics
from verl.plan import MicroBatching

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("experts"), experts=True)


@pytest.fixture(params=["dense", "experts"])
def either(request, path, experts) -> str:
    return {"dense": path, "experts": experts}[request.param]


def build(path: str, *, packed: bool = True, checkpointing: bool = True, **fsdp) -> TrainEngine:
    model = ModelConfig(path=path, use_remove_padding=packed, enable_gradient_checkpointing=checkpointing)
    optim = OptimConfig(lr=1e-3)
    return TrainEngine(model, "policy", FSDPConfig(**fsdp), optim_config=optim, device="cuda")


def gradients(engine: TrainEngine) -> torch.Tensor:
    kept = []
    drop = engine.masters.drop_gradients
    engine.masters.drop_gradients = lambda: (kept.append(dict(engine.masters.gradients())), drop())
    engine.optimizer.grad_clip = None
    engine.update(table(), loss, batching=BATCHING)
    return torch.cat([kept[0][name].flatten() for name in sorted(kept[0])])


def flat(column: pa.ListArray) -> np.ndarray:
    return np.concatenate(column.to_pylist())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_packed_numbers_are_those_of_one_sequence_at_a_time(either, compiled):
    engine = build(either, use_torch_compile=compiled)
    assert engine.packed
    found = engine.log_probs(table(), temperature=0.7, batching=BATCHING)
    whole = build(either, packed=False, dtype="float32", use_torch_compile=False)
    assert not whole.packed
    assert whole.unpackable is None
    expected = whole.log_probs(table(), temperature=0.7, batching=MicroBatching(1))
    rounded = build(either, packed=False, use_torch_compile=False).log_probs(
        table(), temperature=0.7, batching=MicroBatching(1)
    )
    for name in expected:
        error, usual = (np.abs(flat(each[name]) - flat(expected[name])) for each in (found, rounded))
        print(f"{name}: mean error {error.mean():.2g}, of padded bfloat16 {usual.mean():.2g}")
        assert error.mean() < 1.2 * usual.mean()
        assert error.max() < 2 * usual.max()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_packed_gradients_are_those_of_float32(either, compiled, checkpointing):
    exact = gradients(build(either, packed=False, dtype="float32", use_torch_compile=False))
    usual = gradients(build(either, packed=False, use_torch_compile=False))
    found = gradients(build(either, use_torch_compile=compiled, checkpointing=checkpointing))
    error, usual_error = ((each - exact).norm() / exact.norm() for each in (found, usual))
    print(f"relative error {error:.2g}, of padded bfloat16 {usual_error:.2g}")
    assert error < 1.2 * usual_error


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_optimizer_on_the_host_trains_bitwise_as_one_on_the_device(path, monkeypatch, dtype):
    monkeypatch.setattr("verl.engine.optim.BUCKET", 1 << 20)
    rooms = {"still": None, "moved": None, "in part": 9 << 20, "streamed": 0}  # of 21 or 31 MB
    engines = {name: build(path, dtype=dtype, optimizer_offload=name != "still") for name in rooms}
    for _ in range(3):
        metrics = []
        for name, engine in engines.items():
            if name != "still":
                engine.offload(params=True, optimizer=True)
                engine._state_room = rooms[name]
                engine.onload(params=True, optimizer=True)
                assert engine._state.loaded == (rooms[name] is None)
                assert (engine._state.loaded_bytes > 0) == (rooms[name] != 0)
            metrics.append(engine.update(table(), loss, batching=BATCHING))
        assert all(each == metrics[0] for each in metrics)
    for first, *others in zip(*(engine.weights() for engine in engines.values()), strict=True):
        assert all(torch.equal(first[1], other[1]) for other in others)


@pytest.mark.parametrize("fused", [False, True])
def test_memory_for_logits_does_not_grow_with_tokens(fused):
    head = torch.nn.Linear(256, 50_000, bias=False, device="cuda", dtype=torch.bfloat16)

    def peak(tokens: int) -> int:
        hidden = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        targets = torch.randint(50_000, (tokens,), device="cuda")
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            outputs = token_statistics(hidden, head, targets, 0.7, True, block=1 << 26, fused=fused)
            (outputs["log_probs"] + outputs["entropy"]).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    small, large = peak(4096), peak(32768)
    print(f"peak {small / 1e6:.0f} MB for 4096 tokens, {large / 1e6:.0f} MB for 32768, of logits {32768 * 0.1:.0f} MB")
    assert large < small + 8 * 32768 * 256 * 2


def test_fused_numbers_and_gradients_are_the_plain_ones():
    torch.manual_seed(0)
    head = torch.nn.Linear(256, 50_000, bias=True, device="cuda", dtype=torch.float32)
    hidden = torch.randn(300, 256, device="cuda", requires_grad=True)
    targets, weights = torch.randint(50_000, (300,), device="cuda"), torch.randn(2, 300, device="cuda")
    log_probs = (head(hidden) / 0.7).log_softmax(-1)
    plain = torch.stack([log_probs[torch.arange(300), targets], -(log_probs.exp() * log_probs).sum(-1)])
    expected = torch.autograd.grad((weights * plain).sum(), [hidden, head.weight, head.bias])
    outputs = token_statistics(hidden, head, targets, 0.7, True, block=128 * 50_000, fused=True)
    found = torch.stack([outputs["log_probs"], outputs["entropy"]])
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    gradients = torch.autograd.grad((weights * found).sum(), [hidden, head.weight, head.bias])
    for one, two in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
