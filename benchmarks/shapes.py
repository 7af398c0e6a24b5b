"""Shapes of known models, and folders with random weights of them, for benchmarks that need no download."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "demo"))
from make_model import make_tokenizer

SHAPES = {  # Qwen2.5's, and one for a CPU
    "tiny": {"hidden": 128, "mlp": 256, "layers": 2, "heads": 4, "key_heads": 2, "vocab": 2048, "tied": True},
    "0.5b": {"hidden": 896, "mlp": 4864, "layers": 24, "heads": 14, "key_heads": 2, "vocab": 151936, "tied": True},
    "1.5b": {
        "hidden": 1536,
        "mlp": 8960,
        "layers": 28,
        "heads": 12,
        "key_heads": 2,
        "vocab": 151936,
        "tied": True,
    },
    "7b": {
        "hidden": 3584,
        "mlp": 18944,
        "layers": 28,
        "heads": 28,
        "key_heads": 4,
        "vocab": 152064,
        "tied": False,
    },
}


def shape_config(shape: str) -> Qwen2Config:
    if shape not in SHAPES:
        sys.exit(f"--shape: there is no {shape!r}, but {', '.join(SHAPES)}")
    sizes = SHAPES[shape]
    return Qwen2Config(
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["mlp"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["key_heads"],
        vocab_size=sizes["vocab"],
        tie_word_embeddings=sizes["tied"],
        max_position_embeddings=32768,
        rope_theta=1e6,
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
    )


def write_random_model(shape: str, folder: Path, device: str, seed: int = 0) -> None:
    """bfloat16 weights, and the demo's tokenizer: it knows few of the model's tokens, which is all that is needed."""
    tokenizer = make_tokenizer()
    config = shape_config(shape)
    config.bos_token_id, config.pad_token_id, config.eos_token_id = None, tokenizer.pad_token_id, tokenizer.eos_token_id
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()


def write_prompts(path: Path, count: int, tokens: int, seed: int = 0) -> None:
    """Prompts of at least so many tokens, to be cut to length (data.truncation=left). Any piece of one differs from all
    of another: an engine that keeps what it has computed of equal beginnings saves nothing."""
    random = np.random.default_rng(seed)
    texts = [" ".join(map(str, random.integers(10**8, 10**9, tokens // 8 + 8))) for _ in range(count)]  # 10 tokens each
    prompts = [[{"role": "user", "content": text}] for text in texts]
    truths = [{"ground_truth": "0"}] * count
    pq.write_table(pa.table({"prompt": prompts, "data_source": ["none"] * count, "reward_model": truths}), path)
