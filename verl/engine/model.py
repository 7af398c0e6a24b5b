"""The kinds of models, as modules whose forward gives per-token numbers, and how they are read from disk.

Each wraps a transformers model and is the root of sharding: all that touches parameters happens inside its forward.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from verl.engine.token_statistics import token_statistics
from verl.engine.weight_files import check_loaded
from verl.errors import UserError
from verl.plan import ModelSize

if TYPE_CHECKING:
    from verl.config.sections.parts import ModelConfig

Kind = Literal["policy", "value", "reward"]
Outputs = dict[str, torch.Tensor]

# Config entries that change logits after the head; a model that sets one is refused rather than computed wrongly.
_LOGIT_CHANGERS = {"final_logit_softcapping": None, "logits_scaling": 1, "logit_scale": 1}


class PolicyModel(nn.Module):
    """Log-probabilities of given tokens under a causal language model. fused: see ``token_statistics``."""

    def __init__(self, hf: transformers.PreTrainedModel, fused: bool = False):
        super().__init__()
        self.hf, self.fused = hf, fused

    def forward(
        self,
        input_ids: torch.Tensor,
        layout: Mapping[str, Any],
        positions: torch.Tensor,
        targets: torch.Tensor,
        temperature: float = 1.0,
        entropy: bool = True,
    ) -> Outputs:
        """input_ids (B, L), layout, positions (T,) and targets (T,) as in ``MicroBatch``. Gives float32 (T,) each:

        log_probs: ``log_softmax(logits / temperature)`` over the full vocabulary, at the target.
        entropy: of that distribution, in nats; left out if not asked for.
        """
        hidden = _hidden_states(self.hf, input_ids, layout, positions)
        head = cast(nn.Linear, self.hf.get_output_embeddings())
        return token_statistics(hidden, head, targets, temperature, entropy, fused=self.fused)


class ValueModel(nn.Module):
    """A scalar for each state: a transformers token classifier (of a reward model: sequence classifier) with one label,
    whose head runs in float32."""

    def __init__(self, hf: transformers.PreTrainedModel):
        super().__init__()
        self.hf = hf

    def forward(self, input_ids: torch.Tensor, layout: Mapping[str, Any], positions: torch.Tensor) -> Outputs:
        """values: float32 (T,), of the state in which each response token is chosen, before it is emitted."""
        head: Any = self.hf.score
        values = _hidden_states(self.hf, input_ids, layout, positions).float() @ head.weight[0].float()
        return {"values": values if head.bias is None else values + head.bias.float()}


def _hidden_states(
    hf: transformers.PreTrainedModel, input_ids: torch.Tensor, layout: Mapping[str, Any], positions: torch.Tensor
) -> torch.Tensor:
    """The backbone's last hidden state at ``positions``: (T, H). Without a mask attention is plainly causal."""
    hidden_BLH = hf.base_model(input_ids=input_ids, use_cache=False, **layout).last_hidden_state
    return hidden_BLH.flatten(0, 1).index_select(0, positions)


# ---- reading a model


def read_config(model: ModelConfig, kind: Kind) -> transformers.PreTrainedConfig:
    """The model's transformers config with ``override_config`` applied and every dropout off."""
    path = os.path.expanduser(model.path)
    if path != model.path or path.startswith((".", "/")) or Path(path).exists():
        _check_folder(Path(path), model.path)
    overrides: dict[str, Any] = {"attn_implementation": model.attn_implementation, **model.override_config}
    if kind == "value":
        overrides["num_labels"] = 1
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code, **overrides)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(model.path, error) from error
    if kind == "reward" and config.num_labels != 1:
        why = f"its classifier has {config.num_labels} labels, and a score is one number"
        raise UserError(f"model.path={model.path} is not a reward model: {why} (num_labels in its config.json)")
    if unknown := [key for key in model.override_config if not hasattr(config, key)]:
        raise UserError(f"model.override_config: {model.path} has no {', '.join(unknown)} in its config.json")
    for name, value in config.to_dict().items():  # log-probs must be those of the rollout
        if name == "classifier_dropout" or (isinstance(value, float) and ("dropout" in name or name.endswith("pdrop"))):
            setattr(config, name, 0.0)
    for name, harmless in _LOGIT_CHANGERS.items():
        if kind == "policy" and getattr(config, name, None) not in (None, harmless):
            raise UserError(f"model.path={model.path}: a model with {name}={getattr(config, name)} is not supported")
    return config


def read_model(
    model: ModelConfig, kind: Kind, config: transformers.PreTrainedConfig, dtype: torch.dtype, seed: int
) -> transformers.PreTrainedModel:
    """The model on the CPU in ``dtype``. A value head that the files lack is drawn from ``seed``: N(0, 1 / (H + 1))
    weights, bias 0."""
    try:
        with _quiet():
            hf, report = _auto_class(kind).from_pretrained(
                os.path.expanduser(model.path),
                config=config,
                dtype=dtype,
                trust_remote_code=model.trust_remote_code,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise _unreadable(model.path, error) from error
    missing = set(report["missing_keys"])
    if kind != "policy":
        _check_head(hf, model.path)
    if kind == "value":
        if any(name.startswith("score.") for name in missing):
            _init_head(hf.score, seed)
        missing = {name for name in missing if not name.startswith("score.")}
    if missing:
        raise UserError(f"model.path={model.path}: its files lack {min(missing)} ({len(missing)} tensors in all)")
    check_loaded(hf.named_parameters(), report["unexpected_keys"], model.path)
    return hf


def empty_model(
    model: ModelConfig, kind: Kind, config: transformers.PreTrainedConfig, dtype: torch.dtype
) -> transformers.PreTrainedModel:
    """The same module without storage (meta device): its tensors come from another rank."""
    config = copy.deepcopy(config)
    config.dtype = dtype  # that of the files would be the backbone's under a classifier's head
    with torch.device("meta"):
        hf = _auto_class(kind).from_config(
            config,
            dtype=dtype,
            trust_remote_code=model.trust_remote_code,
            attn_implementation=model.attn_implementation,
        )
    if kind != "policy":
        _check_head(hf, model.path)
    return hf


def model_size(model: ModelConfig, kind: Kind) -> ModelSize:
    """Without reading its weights."""
    config = read_config(model, kind)
    hf = empty_model(model, kind, config, torch.float32)
    named = str(config.dtype).removeprefix("torch.") if config.dtype else None
    return ModelSize(sum(param.numel() for param in hf.parameters()), named)


def write_model(hf: transformers.PreTrainedModel, folder: str | Path, state: dict[str, torch.Tensor] | None) -> None:
    """A folder that transformers loads by path. state: the whole tensors by name, when the module holds only shards."""
    try:
        with _quiet(), _any_generation_config(hf, Path(folder)):
            hf.save_pretrained(folder, state_dict=state)
    except SafetensorError as error:  # how safetensors tells of a disk that is full
        raise OSError(str(error)) from error


def wrap(hf: transformers.PreTrainedModel, kind: Kind, fused: bool = False) -> PolicyModel | ValueModel:
    return PolicyModel(hf, fused) if kind == "policy" else ValueModel(hf)


def _auto_class(kind: Kind):
    return {
        "policy": transformers.AutoModelForCausalLM,
        "value": transformers.AutoModelForTokenClassification,
        "reward": transformers.AutoModelForSequenceClassification,
    }[kind]


@contextmanager
def _any_generation_config(hf: transformers.PreTrainedModel, folder: Path) -> Iterator[None]:
    """Within the block the module has the default generation config. Its own is written to the folder afterwards.

    transformers refuses to save a config that looks contradictory, such as top_k without do_sample. Models on the hub
    have such files."""
    own = getattr(hf, "generation_config", None)  # a classifier has none
    if own is None:
        yield
        return
    hf.generation_config = transformers.GenerationConfig()
    try:
        yield
    finally:
        hf.generation_config = own
    own.to_json_file(folder / "generation_config.json")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bars and load report: what is wrong is raised here."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _check_folder(path: Path, given: str) -> None:
    if not path.is_dir():
        raise UserError(
            f"model.path={given} does not exist: give a folder in Hugging Face format, or the name of a hub model"
        )
    if not (path / "config.json").is_file():
        raise UserError(f"model.path={given} is not a model: the folder has no config.json")


def _unreadable(path: str, error: Exception) -> UserError:
    return UserError(f"model.path={path} could not be loaded: {str(error).strip() or type(error).__name__}")


def _check_head(hf: transformers.PreTrainedModel, path: str) -> None:
    if not isinstance(getattr(hf, "score", None), nn.Linear):
        raise UserError(f"model.path={path}: {type(hf).__name__} has no linear 'score' head, so it cannot give scalars")


def _init_head(head: nn.Linear, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1)
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.zero_()
