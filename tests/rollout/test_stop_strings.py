"""StopWatch against decoding the whole response anew after every token, on byte-level and word-piece tokenizers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from verl.rollout.contract.stops import StopWatch

PIECES = ["a", "b", "ab", "\n", "\n\n", " ", " a", "Q", "Question", ":", " Q", "é", "日", "本", "🙂", ".", "</s>"]


def byte_level() -> PreTrainedTokenizerFast:
    """Tokens for the pieces and for each single byte, so that characters may be spread over tokens."""
    to_byte_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens = ["".join(part for part, _ in to_byte_letters.pre_tokenize_str(piece)) for piece in PIECES]
    tokens += sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(tokens))
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    """Tokens that carry a space in front, which the decoder drops from a text's first token."""
    tokens = [piece.replace(" ", "▁") for piece in PIECES] + ["▁b", "▁▁", "▁Question"]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="a"))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {"byte_level": byte_level(), "metaspace": metaspace()}


def decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def first_hit_by_hand(tokenizer: PreTrainedTokenizerFast, ids: list[int], stops: list[str]) -> int | None:
    for length in range(1, len(ids) + 1):
        if any(stop in decode(tokenizer, ids[:length]) for stop in stops):
            return length
    return None


def first_hit(tokenizer: PreTrainedTokenizerFast, ids: list[int], stops: list[str]) -> int | None:
    watch = StopWatch(tokenizer, stops)
    return next((length for length, token in enumerate(ids, 1) if watch.push(token)), None)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_stop_string_is_seen_at_the_token_that_completes_it(name, data):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, len(PIECES) + 2), min_size=1, max_size=40), "ids")
    text = decode(tokenizer, ids)
    start = data.draw(st.integers(0, max(0, len(text) - 1)), "start")
    stops = [text[start : start + data.draw(st.integers(1, 9), "size")] or "a", "ab\n", "🙂🙂"]
    if any("\ufffd" in stop for stop in stops):
        return
    assert first_hit(tokenizer, ids, stops) == first_hit_by_hand(tokenizer, ids, stops)


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet="aé日🙂\n", min_size=1, max_size=30), start=st.integers(0, 29), size=st.integers(1, 5))
def test_characters_spread_over_several_tokens_are_seen_when_whole(text, start, size):
    tokenizer = TOKENIZERS["byte_level"]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    ids = tokenizer.convert_tokens_to_ids([letter for part, _ in letters for letter in part])
    assert decode(tokenizer, ids) == text
    stops = [text[start % len(text) :][:size]]
    assert first_hit(tokenizer, ids, stops) == first_hit_by_hand(tokenizer, ids, stops)


def test_bytes_that_are_no_character_do_not_hide_later_stops():
    tokenizer = TOKENIZERS["byte_level"]
    lone = tokenizer.convert_tokens_to_ids("æ")  # the first byte of a three-byte character
    ids = [lone] * 9 + [0, lone, 1, 0, 1]
    assert first_hit(tokenizer, ids, ["ba"]) == 13


def test_a_stop_that_came_before_is_not_seen_again():
    tokenizer = TOKENIZERS["byte_level"]
    a, b = 0, 1
    watch = StopWatch(tokenizer, ["ab", "bbbbbb"])
    assert [watch.push(token) for token in (a, b, a, a, b, b)] == [False, True, False, False, True, False]
