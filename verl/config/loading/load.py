"""Loads a complete, checked configuration from the command line, and collects all problems."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl.config.loading.collect import Settings
from verl.config.loading.help import help_text
from verl.config.loading.overrides import parse_arguments
from verl.config.loading.problems import NO_VALUE, Problem
from verl.config.loading.settle import decide_aggregation, decide_kl, divide_over_ranks, fit_types, resolve_references
from verl.config.loading.validate import draft, validate
from verl.config.sections.models import Config, Root

AnyConfig = TypeVar("AnyConfig", bound=Root)


@dataclass(frozen=True)
class Loaded(Generic[AnyConfig]):
    """config: the configuration; None if there are problems.
    draft: the configuration. If there are problems, the wrong keys have their defaults (schema.MISSING if they have
        none), so that the rest can be checked too.
    set_keys: the keys that the user set, under the names used here.
    notices: what was read differently from how it was written, or decided for the user.
    """

    config: AnyConfig | None
    draft: AnyConfig
    set_keys: frozenset[str]
    notices: list[str]
    problems: list[Problem]


def load(argv: Sequence[str], schema: type[AnyConfig] = Config) -> Loaded[AnyConfig]:  # type: ignore[assignment]
    """The configuration from files, in their order, and then the command line. Later settings win. ``--help`` prints
    and exits."""
    arguments = parse_arguments(argv)
    if arguments.help is not None:
        print(help_text(schema, arguments.help))
        sys.exit(0)
    settings = Settings(schema, problems=arguments.problems)
    for file in arguments.files:
        read_file(file, settings)
    for override in arguments.overrides:
        settings.apply(override)
    fit_types(settings)
    resolve_references(settings)
    divide_over_ranks(settings)
    decide_kl(settings)
    decide_aggregation(settings)
    config = validate(settings, schema)
    return Loaded(config, config or draft(settings, schema), settings.set_keys, settings.notices, settings.problems)


def read_file(file: str, settings: Settings) -> None:
    try:
        content = OmegaConf.to_container(OmegaConf.load(Path(file).expanduser()), resolve=False)
    except (OSError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        settings.problem(f"--config {file}", NO_VALUE, f"the file cannot be read: {reason}", "name a YAML file")
        return
    if isinstance(content, Mapping):
        settings.apply_file(file, {str(name): value for name, value in content.items()})
    else:
        settings.problem(f"--config {file}", NO_VALUE, "the file holds no keys", "write key: value lines in it")
