from __future__ import annotations

import copy
import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen2Config

from verl.data.tokenizer import decode, encode_chat, encode_chats, end_token_ids, load_tokenizer
from verl.errors import UserError

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 3?"}]


def test_a_chat_has_the_ids_that_transformers_gives_it(tokenizer):
    reference = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert encode_chat(tokenizer, CHAT) == reference["input_ids"]


def test_chats_of_different_lengths_are_encoded_together_as_one_by_one(tokenizer):
    chats = [CHAT, CHAT[1:], [{"role": "user", "content": "naïve café ✓"}]]
    assert encode_chats(tokenizer, chats) == [encode_chat(tokenizer, chat) for chat in chats]


def test_the_templates_beginning_token_is_not_doubled_by_the_tokenizer(tokenizer):
    ids = encode_chat(tokenizer, CHAT)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")


def test_template_arguments_reach_the_template(tokenizer):
    ids = encode_chat(tokenizer, CHAT, thinking=True)
    assert tokenizer.decode(ids).endswith("<|assistant|><think>")


def test_without_a_template_a_prompt_is_its_contents_one_a_line(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    assert plain.decode(encode_chat(plain, CHAT)) == "<|bos|>Be brief.\nWhat is 2 + 3?\n"


def test_decoding_leaves_special_tokens_out_and_spaces_alone(tokenizer):
    text = "  x , y .  #### 5 "
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert decode(tokenizer, ids) == text


def test_a_saved_tokenizer_loads(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert encode_chat(loaded, CHAT) == encode_chat(tokenizer, CHAT)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone.*no such folder"):
        load_tokenizer(str(tmp_path / "gone"))


def test_a_folder_without_tokenizer_files_is_named(tmp_path):
    with pytest.raises(UserError, match="no tokenizer files"):
        load_tokenizer(str(tmp_path))


def test_an_empty_tokenizer_that_transformers_makes_up_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert len(AutoTokenizer.from_pretrained(tmp_path)) <= 1  # the trap
    with pytest.raises(UserError, match=r"is empty.*tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_a_hub_model_that_cannot_be_reached_is_named():  # tests/conftest.py sets HF_HUB_OFFLINE
    with pytest.raises(UserError, match=r"nobody/no-such-model.*cache or on the hub"):
        load_tokenizer("nobody/no-such-model")


def test_responses_end_at_the_tokenizers_and_the_models_end_tokens(tokenizer, tmp_path):
    assert end_token_ids(tokenizer, str(tmp_path)) == (tokenizer.eos_token_id,)
    GenerationConfig(eos_token_id=[7, tokenizer.eos_token_id, 3]).save_pretrained(tmp_path)
    assert end_token_ids(tokenizer, str(tmp_path)) == (3, 7, tokenizer.eos_token_id)
    GenerationConfig(eos_token_id=5).save_pretrained(tmp_path)
    assert end_token_ids(tokenizer, str(tmp_path)) == (5, tokenizer.eos_token_id)


def test_a_tokenizer_without_any_end_token_is_refused(tokenizer, tmp_path):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        end_token_ids(endless, str(tmp_path))


def test_a_tokenizer_that_transformers_would_load_as_another_is_refused(tmp_path):
    """For a Qwen2 model transformers builds Qwen2's tokenizer around the saved vocabulary; whole words are lost."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "Ann": 2, "has": 3, "apples": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    saved = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    saved.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))("Ann has apples")["input_ids"] == [2, 3, 4]
    Qwen2Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"Qwen2Tokenizer.*tokenizer_class"):
        load_tokenizer(str(tmp_path))
