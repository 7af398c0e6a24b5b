"""The tokenizer: loading it, chats to token ids, token ids to text, and which tokens end a response."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from verl.errors import UserError

Message = dict[str, Any]  # {"role": ..., "content": ...}


PROBE = "Ann has 12 apples, and buys 3.50 more?\n#### 15 'tis naïve"


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or a hub id; UserError when there is none."""
    folder = Path(path).expanduser()
    looks_local = folder.is_dir() or path.startswith(("/", "~", ".")) or path.count("/") > 1
    if looks_local and not folder.is_dir():
        raise UserError(f"no tokenizer at {path}: there is no such folder. Name a model folder or a hub id.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder) if looks_local else path, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        where = "the folder has no tokenizer files" if looks_local else "it is not in the local cache or on the hub"
        raise UserError(
            f"no tokenizer could be loaded from {path} ({where}, or they need another package): {reason}"
        ) from error
    check_text_survives(tokenizer, path, folder)
    # Without its files, transformers builds some tokenizers (Qwen2's) with no vocabulary and says nothing.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise UserError(
            f"the tokenizer of {path} is empty: the folder has no tokenizer.json or vocabulary file. "
            "Copy the tokenizer's files there (tokenizer.save_pretrained)."
        )
    return tokenizer


def check_text_survives(tokenizer: PreTrainedTokenizerBase, path: str, folder: Path) -> None:
    """transformers may build the class that belongs to the model's type around the saved vocabulary, and drop how the
    saved tokenizer cuts texts: compared with what tokenizer.json itself makes of a text."""
    saved = folder / "tokenizer.json"
    if saved.is_file():
        ids = Tokenizer.from_file(str(saved)).encode(PROBE, add_special_tokens=False).ids
        if tokenizer(PROBE, add_special_tokens=False)["input_ids"] != ids:
            raise UserError(
                f"transformers loads the tokenizer of {path} as {type(tokenizer).__name__}, which cuts texts otherwise "
                "than its tokenizer.json does. Set a fitting tokenizer_class in its tokenizer_config.json, or put the "
                "tokenizer into a folder without the model's config.json and name it in model.tokenizer_path."
            )


def end_token_ids(tokenizer: PreTrainedTokenizerBase, model_path: str) -> tuple[int, ...]:
    """The tokens that end a response: the tokenizer's own and those of the model's generation_config.json, sorted.

    Chat models often have two, one at the end of a turn and one at the end of a text.
    """
    ids = {tokenizer.eos_token_id}
    try:
        generation = GenerationConfig.from_pretrained(str(Path(model_path).expanduser()))
    except (OSError, ValueError):  # a model without that file
        generation = None
    if generation is not None:
        extra = generation.eos_token_id
        ids.update(extra if isinstance(extra, list | tuple) else [extra])
    ids.discard(None)
    if not ids:
        raise UserError(f"the tokenizer of {model_path} has no end token: set eos_token in its tokenizer_config.json")
    return tuple(sorted(ids))


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **template: Any) -> list[int]:
    """See ``encode_chats``."""
    return encode_chats(tokenizer, [messages], **template)[0]


def encode_chats(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Sequence[Message]], **template: Any
) -> list[list[int]]:
    """Each chat's token ids, up to where the assistant's answer begins.

    Through the tokenizer's chat template with add_generation_prompt; ``template``: further arguments of it. A tokenizer
    without a template (a base model's): the messages' contents, each ended by a newline, roles left out, with the
    special tokens that the tokenizer puts around any text before it (a BOS), and no end token.
    """
    if not tokenizer.chat_template:
        texts = ["".join(f"{message['content']}\n" for message in chat) for chat in chats]
        encoded = tokenizer(texts, add_special_tokens=True)["input_ids"]
        return [_without_end(tokenizer, ids) for ids in encoded]
    rendered = tokenizer.apply_chat_template(
        [list(chat) for chat in chats], tokenize=False, add_generation_prompt=True, **template
    )
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]  # the template wrote them


def _without_end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    return ids[:-1] if ids and ids[-1] in ends else ids


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text as a reader, or a scorer, sees it: special tokens left out, spaces as they were generated."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
