"""One optimizer step: the same for any split, equal to a plain loop of torch and transformers."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from engine_helpers import (
    ALL,
    LOSSES,
    build,
    largest_difference,
    make_table,
    policy_loss,
    reference_loss,
    state_of,
    weights_of,
)

from verl.engine.optim import lr_factor
from verl.engine.packing import Packer
from verl.plan import MicroBatching

# A key bias has no gradient but rounding, which AdamW with its usual eps would make a step of.
EPS = 1e-5
LIMITS = [(1, None), (2, None), (5, None), (None, 16), (None, 60), (4, 40)]
SPLITS = [MicroBatching(rows, tokens) for rows, tokens in LIMITS]


def reference_weights(path: str, kind: str, steps: int, clip: float) -> dict[str, torch.Tensor]:
    auto = transformers.AutoModelForCausalLM if kind == "policy" else transformers.AutoModelForTokenClassification
    hf = auto.from_pretrained(path, dtype=torch.float32)
    hf.eval()
    optimizer = torch.optim.AdamW(hf.parameters(), lr=1e-3, weight_decay=0.01, eps=EPS)
    for _ in range(steps):
        optimizer.zero_grad()
        reference_loss(kind, hf, make_table()).backward()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), clip)
        optimizer.step()
    return {name: param.detach() for name, param in hf.named_parameters()}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("kind", ["policy", "value"])
def test_three_updates_equal_a_plain_training_loop(any_tiny, tmp_path, kind, checkpointing, packed):
    build(any_tiny, kind, trained=False).export_hf(tmp_path)  # gives the value model its head
    engine = build(str(tmp_path), kind, checkpointing=checkpointing, packed=packed, eps=EPS)
    for _ in range(3):
        engine.update(make_table(), LOSSES[kind], batching=MicroBatching(3))
    assert largest_difference(weights_of(engine), reference_weights(str(tmp_path), kind, 3, clip=1.0)) < 1e-5


def test_cuts_that_save_padding_change_no_gradient(tiny):
    table, budget = make_table(60), MicroBatching(max_tokens=16384)
    assert len(Packer(table, torch.device("cpu")).micro_batches(budget)) > 1
    cut, whole = build(tiny, eps=EPS), build(tiny, eps=EPS)
    found = cut.update(table, policy_loss, batching=budget)
    assert found == pytest.approx(whole.update(table, policy_loss, batching=ALL), rel=1e-5, abs=1e-6)
    assert largest_difference(weights_of(cut), weights_of(whole)) < 1e-6


@pytest.mark.parametrize("kind", ["policy", "value"])
def test_update_is_the_same_for_any_micro_batch_size_and_token_budget(tiny, kind):
    def three_updates(batching):
        engine = build(tiny, kind, eps=EPS)
        metrics = [engine.update(make_table(), LOSSES[kind], batching=batching) for _ in range(3)]
        return weights_of(engine), metrics

    weights, metrics = three_updates(ALL)
    for batching in SPLITS:
        other, other_metrics = three_updates(batching)
        assert largest_difference(other, weights) < 1e-5, batching
        for one, two in zip(metrics, other_metrics, strict=True):
            assert one.keys() == two.keys()
            assert all(one[key] == pytest.approx(two[key], rel=1e-5, abs=1e-6) for key in one), batching


def test_metrics_are_summed_and_the_norm_is_of_the_whole_gradient(tiny):
    table = make_table()
    hf = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    loss = reference_loss("policy", hf, table)
    loss.backward()
    norm = math.sqrt(sum(param.grad.double().square().sum() for param in hf.parameters()))
    metrics = build(tiny).update(table, policy_loss, batching=MicroBatching(2))
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["tokens"] == sum(map(sum, table["response_mask"].to_pylist()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert metrics["skipped"] == 0.0
    assert metrics["lr"] == 1e-3


def test_the_loss_sees_each_token_once_with_its_columns_and_row(tiny):
    table, seen = make_table(), {}

    def loss_fn(outputs, batch):
        for row, token, advantage in zip(batch["row_ids"], batch["response_ids"], batch["advantages"], strict=True):
            seen.setdefault(int(row), []).append((int(token), float(advantage)))
        return outputs["log_probs"].sum() * 0, {}

    build(tiny).update(table, loss_fn, batching=MicroBatching(2))
    for row, (tokens, advantages) in enumerate(
        zip(table["response_ids"].to_pylist(), table["advantages"].to_pylist(), strict=True)
    ):
        assert seen.get(row, []) == list(zip(tokens, advantages, strict=True))


@pytest.mark.parametrize("kind", ["policy", "value"])
def test_recomputing_activations_gives_bitwise_the_same_update(tiny, kind):
    engines = [build(tiny, kind, checkpointing=on) for on in (False, True)]
    for engine in engines:
        engine.update(make_table(), LOSSES[kind], batching=MicroBatching(3))
    assert largest_difference(*map(weights_of, engines)) == 0


def test_recomputing_really_recomputes(tiny):
    """A layer's MLP is entered twice in a forward and backward."""
    for on, calls in ((False, 1), (True, 2)):
        engine, count = build(tiny, checkpointing=on), []
        engine.module.model.layers[0].mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        engine.update(make_table(), policy_loss, batching=ALL)
        assert len(count) == calls


def test_clipping_limits_the_norm_and_none_means_no_clipping(tiny):
    """With eps far above the gradient, AdamW's first step is proportional to it."""
    table, start = make_table(), weights_of(build(tiny))

    def moved(clip):
        engine = build(tiny, grad_clip=clip, eps=1e6, lr=1e3, weight_decay=0.0)
        norm = engine.update(table, policy_loss, batching=ALL)["grad_norm"]
        step = {name: (tensor - start[name]) for name, tensor in weights_of(engine).items()}
        return norm, math.sqrt(sum(float(each.double().square().sum()) for each in step.values()))

    norm, free = moved(None)
    clipped_norm, clipped = moved(norm / 4)
    assert clipped_norm == pytest.approx(norm)
    assert clipped == pytest.approx(free / 4, rel=1e-3)
    assert moved(norm * 2)[1] == pytest.approx(free, rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(tiny, tmp_path, dtype, poison):
    engine = build(tiny, dtype=dtype)
    engine.update(make_table(), policy_loss, batching=ALL)
    before = state_of(engine, tmp_path / "before")

    def poisoned(outputs, batch):
        loss, metrics = policy_loss(outputs, batch)
        return (loss * poison if 0 in batch["row_ids"] else loss), metrics

    metrics = engine.update(make_table(), poisoned, batching=MicroBatching(1))
    assert metrics["skipped"] == 1.0
    assert not math.isfinite(metrics["grad_norm"])
    assert largest_difference(state_of(engine, tmp_path / "after"), before) == 0
    clean = build(tiny, dtype=dtype)
    for _ in range(2):
        clean.update(make_table(), policy_loss, batching=ALL)
    engine.update(make_table(), policy_loss, batching=ALL)
    assert largest_difference(weights_of(engine), weights_of(clean)) == 0


def test_an_update_without_any_response_token_is_an_update_with_gradient_zero(tiny):
    table = make_table().slice(2, 1)
    engine = build(tiny, weight_decay=0.0)
    before = weights_of(engine)
    metrics = engine.update(table, policy_loss, batching=ALL)
    assert metrics == {"grad_norm": 0.0, "lr": 1e-3, "skipped": 0.0}
    assert largest_difference(weights_of(engine), before) == 0


# ---- bfloat16 with float32 masters


def test_steps_smaller_than_bfloat16_resolves_add_up(tiny):
    engine = build(tiny, dtype="bfloat16", lr=1e-5, weight_decay=0.0)

    def matrix() -> torch.Tensor:
        return weights_of(engine)["model.layers.0.mlp.up_proj.weight"]

    def push(outputs, batch):
        return -outputs["log_probs"].sum(), {}

    start = matrix()
    assert start.dtype == torch.bfloat16
    engine.update(make_table(), push, batching=ALL)
    assert (matrix() != start).float().mean() < 0.1
    for _ in range(99):
        engine.update(make_table(), push, batching=ALL)
    assert (matrix() != start).float().mean() > 0.5


def test_bfloat16_gradients_of_many_micro_batches_are_summed_in_float32(tiny):
    """Of 400 equal micro-batches: a sum in bfloat16 stalls once it is 256 times its summands."""
    row = make_table().slice(0, 1)
    table = pa.concat_tables([row] * 400)
    one, many = (build(tiny, dtype="bfloat16", grad_clip=None) for _ in range(2))
    norm = one.update(row, policy_loss, batching=MicroBatching(1))["grad_norm"]
    assert many.update(table, policy_loss, batching=MicroBatching(1))["grad_norm"] == pytest.approx(
        400 * norm, rel=1e-4
    )


def test_bfloat16_training_follows_float32_training(tiny):
    engines = {dtype: build(tiny, dtype=dtype) for dtype in ("float32", "bfloat16")}
    losses = {
        dtype: [engine.update(make_table(), policy_loss, batching=MicroBatching(3))["loss"] for _ in range(8)]
        for dtype, engine in engines.items()
    }
    assert losses["float32"][-1] < losses["float32"][0] - 0.3
    assert np.allclose(losses["bfloat16"], losses["float32"], atol=0.05)


def test_auto_is_float32_on_a_cpu(tiny):
    assert build(tiny, dtype="auto").compute_dtype == torch.float32


# ---- schedules


@pytest.mark.parametrize(
    ("kind", "reference"),
    [
        ("constant", lambda optimizer: transformers.get_constant_schedule_with_warmup(optimizer, 3)),
        ("linear", lambda optimizer: transformers.get_linear_schedule_with_warmup(optimizer, 3, 12)),
        ("cosine", lambda optimizer: transformers.get_cosine_schedule_with_warmup(optimizer, 3, 12)),
        (
            "cosine",
            lambda optimizer: transformers.get_cosine_with_min_lr_schedule_with_warmup(
                optimizer, 3, 12, min_lr_rate=0.25
            ),
        ),
    ],
)
@pytest.mark.parametrize("warmup", [{"lr_warmup_steps": 3}, {"lr_warmup_steps_ratio": 0.25}], ids=["steps", "ratio"])
def test_schedules_are_those_of_transformers(tiny, kind, reference, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    schedule = reference(optimizer)
    floor = 0.25 if "min_lr" in str(reference.__code__.co_names) else 0.0
    engine = build(tiny, lr=2e-3, lr_scheduler_type=kind, min_lr_ratio=floor, total_steps=12, **warmup)
    for _ in range(13):
        lr = engine.update(make_table().slice(0, 1), policy_loss, batching=ALL)["lr"]
        assert lr == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        schedule.step()
        engine.step_schedule()


@pytest.mark.parametrize(("kind", "factor"), [("constant", 1.0), ("linear", 0.1), ("cosine", 0.1)])
def test_after_its_last_step_a_schedule_stays_where_it_ended(kind, factor):
    for step in (12, 13, 100):
        assert lr_factor(step, kind, warmup=3, total=12, floor=0.1) == pytest.approx(factor)


def test_several_updates_of_one_iteration_share_a_learning_rate(tiny):
    engine = build(tiny, lr_scheduler_type="linear")
    lrs = [engine.update(make_table().slice(0, 1), policy_loss, batching=ALL)["lr"] for _ in range(3)]
    assert lrs == [1e-3] * 3


def test_an_engine_without_an_optimizer_refuses_to_update(tiny):
    with pytest.raises(RuntimeError, match="without an optimizer"):
        build(tiny, trained=False).update(make_table(), policy_loss, batching=ALL)
