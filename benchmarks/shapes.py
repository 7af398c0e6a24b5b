"""Shapes of known models, and folders with random weights of them, for benchmarks that need no download."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "demo"))
from make_model import make_tokenizer

COMMON = {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768}
SHAPES = {  # of Qwen2.5
    "tiny": Qwen2Config(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **COMMON,
    ),
    "0.5b": Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **COMMON,
    ),
    "1.5b": Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **COMMON,
    ),
    "7b": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        **COMMON,
    ),
}


def write_random_model(shape: str, folder: Path, device: str, seed: int = 0) -> None:
    """bfloat16 weights, and the demo's tokenizer: it knows few of the model's tokens, which is all that is needed."""
    tokenizer = make_tokenizer()
    config = SHAPES[shape]
    config.bos_token_id, config.pad_token_id, config.eos_token_id = None, tokenizer.pad_token_id, tokenizer.eos_token_id
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()


def write_prompts(path: Path, count: int, tokens: int) -> None:
    """Prompts of at least so many tokens: to be cut to length (data.truncation=left)."""
    text = " ".join(["What is 12 plus 7 ?"] * tokens)
    prompts = [[{"role": "user", "content": f"{number} {text}"}] for number in range(count)]
    truths = [{"ground_truth": "0"}] * count
    pq.write_table(pa.table({"prompt": prompts, "data_source": ["none"] * count, "reward_model": truths}), path)
