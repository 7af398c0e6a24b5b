"""What the conformance suite needs of an engine, one kit for each. A new engine is a new class in ``KITS``."""

from __future__ import annotations

import asyncio

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from verl.rollout.base import RolloutEngine
from verl.rollout.hf import HFEngine

VOCABULARY, EOS, CONTEXT = 100, 1, 160


def tiny_model(seed: int) -> Qwen2ForCausalLM:
    """Random weights, large enough that distributions are neither flat nor sharp."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=CONTEXT,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=EOS,
            pad_token_id=0,
        )
        return Qwen2ForCausalLM(config).eval()


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """Every token is one character, a different one each."""
    vocabulary = {chr(0x4E00 + index): index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=chr(0x4E00)))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class HFKit:
    """trainer: the model whose weights the engine has to have after ``update_weights``.
    tolerance: how far a log-prob may be from the trainer's forward."""

    tolerance = 5e-5
    context, eos, vocabulary = CONTEXT, EOS, VOCABULARY

    def __init__(self) -> None:
        self.trainer = tiny_model(seed=0)
        self.tokenizer = letters_tokenizer()

    def build(self, max_num_seqs: int = 8, tokenizer: bool = True) -> RolloutEngine:
        return HFEngine(
            self.trainer,
            self.tokenizer if tokenizer else None,
            eos_token_ids=[EOS],
            max_model_len=CONTEXT,
            max_num_seqs=max_num_seqs,
        )

    def train(self) -> None:
        """Change the trainer's weights."""
        with torch.no_grad():
            for param, other in zip(self.trainer.parameters(), tiny_model(seed=1).parameters(), strict=True):
                param.copy_(other)

    async def draw_some(self) -> None:
        """Let requests be under way: some tokens, but not 100."""
        for _ in range(12):
            await asyncio.sleep(0)


KITS = {"hf": HFKit}


@pytest.fixture(params=KITS)
def kit(request: pytest.FixtureRequest) -> HFKit:
    return KITS[request.param]()
