"""Checks of model paths: a folder in Hugging Face format, or a hub id, which is looked up in the local cache only."""

from __future__ import annotations

import difflib
import json
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl.checks.files import existing_ancestor
from verl.findings import Findings
from verl.units import some

if TYPE_CHECKING:
    from verl.config.sections.parts import PolicyModelConfig

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
HEADER_LIMIT = 100_000_000  # bytes, safetensors' own
NO_HEADER = (ValueError, TypeError, LookupError, AttributeError, struct.error)  # what comes of reading something else
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # so begins what `git clone` leaves without Git LFS
FETCH, AGAIN = "run `git lfs pull` there, or download the model again", "download or copy the model again"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class ModelFacts:
    """What a model's folder says without loading it. max_positions: its context length in tokens; None if unsaid.
    parameters: in its files; head: of these, in the output embeddings. dtype: as torch names it. labels: of a sequence
    classifier, which it is by its architectures, or says none (classifies)."""

    folder: Path
    max_positions: int | None
    parameters: int | None
    head: int = 0
    dtype: str | None = None
    labels: int = 2
    classifies: bool = True


def check_model(findings: Findings, key: str, path: str) -> ModelFacts | None:
    """None: no model was found, or it is only on the hub."""
    folder = find_folder(findings, key, path)
    return None if folder is None else _check_folder(findings, key, path, folder)


def check_tokenizer_of(findings: Findings, section: str, model: PolicyModelConfig, facts: ModelFacts | None) -> None:
    """section: the keys' own. facts: of the model; None: it is not here, which was said."""
    if model.tokenizer_path != model.path:
        check_tokenizer_path(findings, f"{section}.tokenizer_path", model.tokenizer_path)
    elif facts is not None:
        elsewhere = f"{section}.tokenizer_path"
        check_tokenizer(findings, f"{section}.path", model.path, facts.folder, elsewhere)


def check_tokenizer_path(findings: Findings, key: str, path: str) -> None:
    folder = find_folder(findings, key, path)
    if folder is not None:
        check_tokenizer(findings, key, path, folder, elsewhere=key)


def check_tokenizer(findings: Findings, key: str, path: str, folder: Path, elsewhere: str) -> None:
    """Checks the tokenizer of a folder. elsewhere: the key that can name another folder for it."""
    found = [folder / name for name in TOKENIZERS if (folder / name).is_file()]
    if not found:
        fix = f"save the tokenizer there, or name its folder in {elsewhere}"
        findings.problem(key, path, f"there is no tokenizer in this folder (none of {', '.join(TOKENIZERS)})", fix)
    if pointers := [file.name for file in found if _is_pointer(file)]:
        findings.problem(key, path, f"only the Git LFS pointer is there of {some(pointers)}", FETCH)


def find_folder(findings: Findings, key: str, path: str) -> Path | None:
    """The local folder of a path or hub id. If there is none, None, and ``findings`` says why."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        findings.problem(key, path, "this is a file, not a folder", "name the folder that holds it")
    elif looks_local(path):
        findings.problem(key, path, "there is no such folder", _nearest(folder))
    elif not HUB_ID.fullmatch(path):
        fix = "name a folder, or a hub id like Qwen/Qwen3-0.6B"
        findings.problem(key, path, "this is neither a folder nor a hub id", fix)
    elif cached := cached_snapshot(path):
        return cached
    else:
        findings.cannot_check(f"{key}={path}: not in the local hub cache, and the hub is asked only when a model loads")
    return None


def looks_local(path: str) -> bool:
    return path.startswith(("/", ".", "~")) or path.count("/") > 1


def cached_snapshot(hub_id: str) -> Path | None:
    """The folder of the hub cache that holds this model. Never asks the network."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def _check_folder(findings: Findings, key: str, path: str, folder: Path) -> ModelFacts | None:
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        findings.problem(key, path, "there is no config.json in this folder", _models_below(folder))
        return None
    except (OSError, ValueError) as error:
        findings.problem(key, path, f"its config.json cannot be read ({error})", "write or download the model again")
        return None
    if "model_type" not in config:
        findings.problem(key, path, "its config.json names no model_type", "name a model that transformers can load")
    _check_weights(findings, key, path, folder)
    text = _text_config(config)
    parameters, head = parameter_counts(folder)
    dtype = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    labels = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)  # as transformers
    architectures = config.get("architectures")
    classifies = not architectures or any("Classification" in name for name in architectures)
    return ModelFacts(folder, text.get("max_position_embeddings"), parameters, head, dtype, labels, classifies)


def _check_weights(findings: Findings, key: str, path: str, folder: Path) -> None:
    found = [name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        findings.problem(
            key, path, f"there are no weights in this folder (none of {', '.join(WEIGHTS)})", _models_below(folder)
        )
        return
    files = [folder / name for name in (_shards(folder / found[0]) if found[0].endswith(".index.json") else found[:1])]
    if missing := [file.name for file in files if not file.is_file()]:
        findings.problem(key, path, f"{len(missing)} of its weight files are missing: {some(missing)}", AGAIN)
    there = [file for file in files if file.is_file()]
    if pointers := [file.name for file in there if _is_pointer(file)]:
        findings.problem(key, path, f"only the Git LFS pointer is there of {some(pointers)}", FETCH)
    elif damaged := [f"{file.name} {why}" for file in there if (why := _damage(file))]:
        findings.problem(key, path, some(damaged), AGAIN)


def _is_pointer(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def _damage(file: Path) -> str | None:
    """What is wrong with a weight file by its header. Only safetensors files have one."""
    if file.suffix != ".safetensors":
        return None
    try:
        start, header = _header(file)
        size = file.stat().st_size
        whole = start + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except NO_HEADER:
        return "is no safetensors file, or only the beginning of one"
    return None if size == whole else f"has {size:,} bytes, and by its header {whole:,}"


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """The offset of the data of a safetensors file, and its entries by tensor. Raises one of ``NO_HEADER``, or
    OSError."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > HEADER_LIMIT:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(stream.read(length))
    return 8 + length, {name: entry for name, entry in header.items() if name != "__metadata__"}


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError):
        return [index.name + " (unreadable)"]


def parameter_counts(folder: Path) -> tuple[int | None, int]:
    """The number of parameters in the folder's safetensors files, by their headers, and how many of them are output
    embeddings. None if there is no such file."""
    total = head = 0
    for file in folder.glob("*.safetensors"):
        try:
            _, header = _header(file)
            sizes = {name: math.prod(entry["shape"]) for name, entry in header.items()}
        except (OSError, *NO_HEADER):
            return None, 0
        total += sum(sizes.values())
        head += sizes.get("lm_head.weight", 0)
    return total or None, head


def _text_config(config: dict) -> dict:
    """The settings of the language model, which a vision-language model keeps in ``text_config``."""
    return config.get("text_config") or config


def _models_below(folder: Path) -> str:
    inside = sorted(
        str(found.parent.relative_to(folder)) for depth in ("*", "*/*") for found in folder.glob(f"{depth}/config.json")
    )
    if inside:
        return f"these folders in it hold a model: {', '.join(inside[:4])}"
    return "name a folder that holds config.json, the weights and the tokenizer (as save_pretrained writes them)"


def _nearest(folder: Path) -> str:
    parent = existing_ancestor(folder)
    missing = folder.absolute().relative_to(parent).parts[0]
    names: Sequence[str] = sorted(entry.name for entry in parent.iterdir() if entry.is_dir())
    close = difflib.get_close_matches(missing, names, n=1, cutoff=0.5)
    if close:
        return f"the nearest name there is {parent / close[0]}"
    return f"the path exists up to {parent}; name a folder, or a hub id like Qwen/Qwen3-0.6B"
