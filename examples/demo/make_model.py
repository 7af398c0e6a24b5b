"""A tokenizer for the demo's problems and a small Qwen2-architecture model with random weights, as folders on disk.

    python examples/demo/make_model.py --folder outputs/demo/random_model --seed 1
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from make_data import ITEMS, NAMES, STORIES, Draw, draw_problem
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

# A word takes the space before it, and the one after it where a digit follows; each digit is a token of its own.
# So numbers are always the same ten tokens, and joining the tokens gives the text back.
PIECES = Regex(r"\d| ?[^\s\d.,?]+(?: (?=\d))?|[.,?] ?|\n|\s")
SPECIAL = ["<pad>", "<unk>", "<eos>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>{{ message['content'] }}<eos>"
    "{% else %}<user>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    splitter = pre_tokenizers.Split(PIECES, behavior="isolated")
    random = np.random.default_rng(0)
    texts = [text for problem in (draw_problem(random) for _ in range(5000)) for text in (problem.question, problem.answer)]
    pieces = sorted({piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)})
    vocabulary = {piece: index for index, piece in enumerate([*SPECIAL, *pieces])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """0.8 M parameters."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(config)
