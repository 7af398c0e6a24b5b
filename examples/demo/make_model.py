"""A tokenizer for the demo's problems and a small Qwen2-architecture model with random weights, as folders on disk.

python examples/demo/make_model.py --folder outputs/demo/random_model --seed 1
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from make_data import draw_problem
from tokenizers import Tokenizer, models, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils import logging

SPECIAL = ["<pad>", "<eos>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>{{ message['content'] }}<eos>"
    "{% else %}<user>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-pair encoding that cuts texts as Qwen2's does, learnt from the demo's own: a word or a digit is one token.

    For a Qwen2 model, AutoTokenizer builds Qwen2's tokenizer from the saved vocabulary; one that cuts texts in another
    way would come back changed.
    """
    random = np.random.default_rng(0)
    problems = [draw_problem(random) for _ in range(5000)]
    qwen2 = Qwen2Tokenizer(vocab={"<|endoftext|>": 0}, merges=[]).backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = qwen2.normalizer, qwen2.pre_tokenizer
    tokenizer.decoder = qwen2.decoder
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator((text for p in problems for text in (p.question, p.answer)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<pad>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """0.76 M parameters."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(config)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1, help="of the model's random weights")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(arguments.folder)
    model = make_model(tokenizer, arguments.seed)
    model.save_pretrained(arguments.folder)
    print(f"{arguments.folder}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")
