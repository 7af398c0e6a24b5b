"""Writes a configuration as YAML text that ``--config`` reads back."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from omegaconf import OmegaConf

from verl.config.loading.collect import SET_BY_USER
from verl.config.sections.models import Root


def resolved_yaml(config: Root, set_keys: Iterable[str] = ()) -> str:
    """YAML text with every key and its value. set_keys: the keys that the user set. A run from this file treats the
    others as defaults."""
    content = {**_literal(config.model_dump(mode="json")), SET_BY_USER: sorted(set_keys)}
    return OmegaConf.to_yaml(OmegaConf.create(content))


def _literal(value: Any) -> Any:
    """The value with every ``${`` escaped."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
