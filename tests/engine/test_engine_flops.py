"""Operations counted by formula, against torch's own count of a real forward."""

import numpy as np
import pytest
import torch
import transformers
from engine_helpers import ALL, VOCAB, build, make_table, save_tiny_model
from torch.utils.flop_counter import FlopCounterMode

from verl.engine.flops import ForwardFlops, peak_flops

SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "tied": transformers.Qwen2Config(**SIZES, **HEADS, tie_word_embeddings=True),
    "untied": transformers.LlamaConfig(**SIZES, **HEADS),
    "wide heads": transformers.Qwen3Config(**SIZES, **HEADS, head_dim=32),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_forward_costs_what_torch_counts(name):
    """torch counts all pairs of tokens; ours are half of them and half of the diagonal, for attention is causal."""
    config = CONFIGS[name]
    hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    length = 24
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hf(torch.randint(VOCAB, (1, length)), use_cache=False)
    counted = counter.get_total_flops()
    lengths = np.array([length])
    ours = ForwardFlops(hf)(lengths, lengths)
    head_dim = getattr(config, "head_dim", None) or 16
    not_causal = 4 * 3 * 4 * head_dim * (length**2 - length * (length + 1) / 2)
    assert ours + not_causal == pytest.approx(counted)


def test_of_experts_those_count_that_a_token_goes_through():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    hf = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(**SIZES, **HEADS, **experts))
    attention = 2 * 64 * 64 + 2 * 64 * 32
    two_experts = 2 * (2 * 32 * 64 + 64 * 32)
    one, head = np.array([1]), VOCAB * 64
    assert ForwardFlops(hf)(one, one) == 2 * (3 * (attention + two_experts) + head) + 4 * 3 * 4 * 16


def test_sequences_and_predicted_tokens_add_up():
    hf = transformers.AutoModelForCausalLM.from_config(CONFIGS["untied"])
    count = ForwardFlops(hf)
    both = count(np.array([5, 9]), np.array([2, 4]))
    assert both == count(np.array([5]), np.array([2])) + count(np.array([9]), np.array([4]))
    assert count(np.array([5]), np.array([2])) - count(np.array([5]), np.array([1])) == 2 * VOCAB * 64


def test_no_peak_is_claimed_for_a_cpu():
    assert peak_flops(torch.device("cpu"), torch.bfloat16) == 0.0


def test_an_engine_adds_up_its_forwards_and_thrice_as_much_for_an_update(tmp_path):
    engine, table = build(save_tiny_model(tmp_path)), make_table(4)
    prompts, responses = (np.array([len(row) for row in table[name]]) for name in ("prompt_ids", "response_ids"))
    predicts = responses > 0
    tokens = prompts[predicts] + responses[predicts] - 1  # nothing comes after the last
    forward = ForwardFlops(engine.module)(tokens, responses[predicts])
    assert engine.flops == 0
    assert forward > 0
    engine.log_probs(table, temperature=1.0, batching=ALL)
    assert engine.flops == pytest.approx(forward)
    engine.update(table, lambda outputs, batch: (outputs["log_probs"].sum(), {}), batching=ALL)
    assert engine.flops == pytest.approx(4 * forward)
