"""Validates resolved settings against the section classes."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from pydantic import ValidationError

from verl.config.loading.collect import Settings
from verl.config.loading.describe import literals, wanted
from verl.config.loading.names import nearest
from verl.config.loading.problems import NO_VALUE, shown
from verl.config.loading.schema import ABSENT, MISSING, get, keys_of, put, sections_of
from verl.config.sections.models import Root, sources_of

AnyConfig = TypeVar("AnyConfig", bound=Root)


def validate(settings: Settings, schema: type[AnyConfig]) -> AnyConfig | None:
    """The configuration. If there are problems, None, and ``settings.problems`` has all of them."""
    for section in sections_of(schema):  # so that a section without settings is validated too
        if get(settings.tree, section) is ABSENT:
            put(settings.tree, section, {})
    try:
        config = schema.model_validate(settings.tree)
    except ValidationError as error:
        locations = [details["loc"] for details in error.errors(include_url=False)]
        _report_misfits(settings, schema, list(dict.fromkeys(_key_at(schema, location) for location in locations)))
        return None
    return None if settings.problems else config


def draft(settings: Settings, schema: type[AnyConfig]) -> AnyConfig:
    """The configuration with wrong values replaced by their defaults (MISSING if there is none), so that the rest can
    be checked."""
    tree = copy.deepcopy(settings.tree)
    while True:
        try:
            return schema.model_validate(tree)
        except ValidationError as error:
            for details in error.errors(include_url=False):
                _reset(schema, tree, _key_at(schema, details["loc"]))


def _reset(schema: type[Root], tree: dict[str, Any], key: str) -> None:
    """Unsets a key. If its default is wrong, unsets the keys that the default comes from."""
    if key not in schema.derived and keys_of(schema)[key].is_required():
        put(tree, key, MISSING)
    elif get(tree, key) is not ABSENT:
        section, _, name = key.rpartition(".")
        del get(tree, section)[name]
    else:
        for source in sources_of(schema.derived.get(key, "")):
            _reset(schema, tree, source)


def _key_at(schema: type[Root], location: tuple[int | str, ...]) -> str:
    """The key of an error's location. The location may continue inside the key's value."""
    known = keys_of(schema)
    names = [part for part in location if isinstance(part, str)]
    return next(prefix for end in range(len(names), 0, -1) if (prefix := ".".join(names[:end])) in known)


def _report_misfits(settings: Settings, schema: type[Root], keys: list[str]) -> None:
    named = {problem.key for problem in settings.problems}
    for key in keys:
        field = keys_of(schema)[key]
        if key in settings.origins:
            if settings.origins[key].given not in named:
                settings.misfit(key, f"it must be: {wanted(field)}", _suggestion(schema, key, get(settings.tree, key)))
        elif key not in schema.derived:
            settings.problem(key, NO_VALUE, f"it must be set: {field.description}", f"add {key}=...")
        elif not any(source in keys for source in sources_of(schema.derived[key])):  # else the source's is the problem
            why = f"it must be: {wanted(field)}; its value comes from {schema.derived[key]}"
            settings.problem(key, NO_VALUE, why, "set it, or change where it comes from")


def _suggestion(schema: type[Root], key: str, value: Any) -> str:
    field = keys_of(schema)[key]
    if isinstance(value, str) and (options := literals(field.annotation)):
        return f"the nearest is {key}={nearest(value, options)}"
    if key in schema.derived:
        return f"leave it out to take {schema.derived[key]}"
    if field.is_required():
        return f"set {key}=..."
    return f"for example {key}={shown(field.default)}, the default"
