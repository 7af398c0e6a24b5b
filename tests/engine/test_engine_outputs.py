"""What the forward gives, against transformers' own forward on one row at a time."""

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from engine_helpers import ALL, VOCAB, build, make_table, save_tiny_model

from verl.data.ragged import Ragged
from verl.engine.token_statistics import token_statistics
from verl.plan import MicroBatching

SPLITS = [ALL, MicroBatching(1), MicroBatching(3), MicroBatching(max_tokens=30), MicroBatching(2, max_tokens=30)]


def reference(path: str, table: pa.Table, temperature: float) -> tuple[list, list]:
    hf = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    log_probs, entropy = [], []
    for row in table.to_pylist():
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        with torch.no_grad():
            scaled = hf(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].double() / temperature
        rows = scaled.log_softmax(-1)
        log_probs.append([rows[t, token].item() for t, token in enumerate(row["response_ids"])])
        entropy.append([-(each.exp() * each).sum().item() for each in rows])
    return log_probs, entropy


def close(column: pa.ListArray, rows: list, tolerance: float) -> bool:
    assert [len(row) for row in column.to_pylist()] == [len(row) for row in rows]
    return np.allclose(np.concatenate(column.to_pylist()), np.concatenate(rows), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("batching", SPLITS, ids=str)
def test_log_probs_and_entropy_equal_those_of_a_plain_forward_row_by_row(any_tiny, batching, packed):
    table = make_table()
    log_probs, entropy = reference(any_tiny, table, temperature=0.7)
    found = build(any_tiny, trained=False, packed=packed).log_probs(table, temperature=0.7, batching=batching)
    assert close(found["log_probs"], log_probs, 2e-5)
    assert close(found["entropy"], entropy, 2e-5)


@pytest.mark.parametrize("window", [1, 2, 5])
def test_packed_sequences_see_as_much_of_a_sliding_window_as_plain_ones(tmp_path, window):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.MistralConfig(vocab_size=VOCAB, num_key_value_heads=1, sliding_window=window, **sizes)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    table = make_table()
    found = build(str(tmp_path), trained=False, packed=True).log_probs(table, temperature=1.0, batching=ALL)
    assert close(found["log_probs"], reference(str(tmp_path), table, 1.0)[0], 2e-5)


def test_entropy_is_left_out_when_not_asked_for(tiny):
    assert build(tiny, trained=False).log_probs(make_table(), temperature=1.0, batching=ALL, entropy=False).keys() == {
        "log_probs"
    }


@pytest.mark.parametrize("batching", SPLITS[:4], ids=str)
def test_a_value_is_that_of_the_state_before_its_token(tiny, tmp_path, batching):
    engine = build(tiny, "value", trained=False)
    engine.export_hf(tmp_path)
    hf = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path, dtype=torch.float32)
    table = make_table()
    values = []
    for row in table.to_pylist():
        for t in range(len(row["response_ids"])):
            state = torch.tensor([row["prompt_ids"] + row["response_ids"][:t]])
            with torch.no_grad():
                values.append(hf(state).logits[0, -1, 0].item())
    found = np.concatenate(engine.values(table, batching=batching).to_pylist())
    assert np.abs(values).max() > 0.01
    assert np.allclose(found, values, rtol=1e-5, atol=1e-6)


def test_a_new_value_head_depends_on_the_seed_alone(tiny):
    def head(seed):
        torch.manual_seed(torch.seed())
        return dict(build(tiny, "value", trained=False, seed=seed).weights())["score.weight"]

    assert torch.equal(head(3), head(3))
    assert not torch.equal(head(3), head(4))
    assert head(3).std() == pytest.approx(1 / 65, rel=0.4)


def test_a_saved_value_model_is_read_with_its_head(tiny, tmp_path):
    build(tiny, "value", trained=False, seed=3).export_hf(tmp_path)
    table = make_table()
    first = build(tiny, "value", trained=False, seed=3).values(table, batching=ALL)
    read = build(str(tmp_path), "value", trained=False, seed=9).values(table, batching=ALL)
    assert read.flatten().to_pylist() == pytest.approx(first.flatten().to_pylist(), rel=1e-5)  # not the head of seed 9


@pytest.mark.parametrize("arch", ["qwen2", "llama"])
def test_dropout_of_the_config_is_off(tmp_path, arch):
    path = save_tiny_model(tmp_path, arch)
    dropped = build(path, override_config={"attention_dropout": 0.5}, checkpointing=True)
    table = make_table()
    found = dropped.log_probs(table, temperature=1.0, batching=ALL)["log_probs"]
    assert close(found, reference(path, table, 1.0)[0], 2e-5)
    seen = []
    dropped.update(
        table,
        lambda outputs, batch: (seen.append(outputs["log_probs"]), (outputs["log_probs"] * 0).sum(), {})[1:],
        batching=ALL,
    )
    assert np.allclose(np.sort(seen[0].detach()), np.sort(np.concatenate(found.to_pylist())), atol=1e-6)


def test_an_empty_table_gives_empty_columns(tiny):
    found = build(tiny, trained=False).log_probs(make_table().slice(0, 0), temperature=1.0, batching=ALL)
    assert len(found["log_probs"]) == 0


def test_a_slice_of_a_table_gives_the_slice_of_the_columns(tiny):
    engine, table = build(tiny, trained=False), make_table()
    whole = engine.log_probs(table, temperature=1.0, batching=ALL)["log_probs"].to_pylist()
    part = engine.log_probs(table.slice(3, 3), temperature=1.0, batching=ALL)["log_probs"].to_pylist()
    assert np.allclose(np.concatenate(part), np.concatenate(whole[3:6]), atol=1e-5)


def test_an_empty_prompt_is_refused(tiny):
    table = make_table()
    prompts = Ragged.from_rows([np.arange(row) for row in range(len(table))], np.int32).to_column()
    table = table.set_column(table.column_names.index("prompt_ids"), "prompt_ids", prompts)
    with pytest.raises(ValueError, match="row 0 has an empty prompt"):
        build(tiny, trained=False).log_probs(table, temperature=1.0, batching=ALL)


def test_a_column_that_is_not_aligned_with_the_response_is_refused(tiny):
    table = make_table().append_column("values", make_table(empty_rows=())["advantages"])
    with pytest.raises(ValueError, match="'values' does not have one entry for each response token"):
        build(tiny, trained=False).log_probs(table, temperature=1.0, batching=ALL)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(tiny, temperature):
    with pytest.raises(ValueError, match="above 0"):
        build(tiny, trained=False).log_probs(make_table(), temperature=temperature, batching=ALL)


@pytest.mark.parametrize("block", [1, 5 * VOCAB, 23 * VOCAB, 10**6])
def test_cutting_the_logits_into_blocks_changes_neither_numbers_nor_gradients(block):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, VOCAB, bias=False)
    hidden = torch.randn(23, 16, requires_grad=True)
    targets, weights = torch.randint(VOCAB, (23,)), torch.randn(2, 23)

    log_probs = (head(hidden) / 1.3).log_softmax(-1)
    naive = torch.stack([log_probs[torch.arange(23), targets], -(log_probs.exp() * log_probs).sum(-1)])
    naive_gradients = torch.autograd.grad((weights * naive).sum(), [hidden, head.weight])

    outputs = token_statistics(hidden, head, targets, 1.3, True, block)
    found = torch.stack([outputs["log_probs"], outputs["entropy"]])
    gradients = torch.autograd.grad((weights * found).sum(), [hidden, head.weight])
    torch.testing.assert_close(found, naive, rtol=1e-5, atol=1e-5)
    for gradient, expected in zip(gradients, naive_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_numbers_are_those_of_a_bfloat16_model(tiny):
    """Weights rounded to bfloat16, rotary frequencies not; log-softmax in float32."""
    hf = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    row = make_table().slice(0, 1)
    prompt, response = row["prompt_ids"][0].as_py(), row["response_ids"][0].as_py()
    with torch.no_grad():
        logits = hf(torch.tensor([prompt + response[:-1]])).logits[0, len(prompt) - 1 :].float()
    expected = logits.log_softmax(-1)[torch.arange(len(response)), response]
    found = build(tiny, dtype="bfloat16").log_probs(row, temperature=1.0, batching=ALL)["log_probs"]
    assert np.allclose(found.to_pylist()[0], expected, atol=1e-6)
