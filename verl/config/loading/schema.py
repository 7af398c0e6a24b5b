"""Dotted keys of a configuration class, and access to nested dicts by dotted key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from verl.config.sections.effects import Condition, NoEffect, ReadBy

ABSENT: Final = PydanticUndefined
MISSING: Final = "???"  # OmegaConf's mark for a required value that is missing


@cache
def keys_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Every key that takes a value, in the order of the classes: "data.seed" -> its field."""
    return {key: field for key, field in _walk(model) if section_of(field) is None}


@cache
def sections_of(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Every section: "data" -> DataConfig."""
    return {key: section for key, field in _walk(model) if (section := section_of(field))}


def _walk(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        yield prefix + name, field
        if section := section_of(field):
            yield from _walk(section, f"{prefix}{name}.")


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


@cache
def conditions_of(model: type[BaseModel], key: str) -> list[tuple[str, Condition]]:
    """The conditions under which a key has no effect, those of outer sections first; each with the dotted name of the
    section that holds it ("" for the whole configuration)."""
    found: list[tuple[str, Condition]] = []
    names = key.split(".")
    for depth, name in enumerate(names):
        field = model.model_fields[name]
        conditions = [item for item in field.metadata if isinstance(item, NoEffect | ReadBy)]
        found += [(".".join(names[:depth]), item) for item in conditions if item.covers(names[depth + 1 :])]
        section = section_of(field)
        if section is None:
            break
        model = section
    return found


def choices(annotation: Any) -> set[Any]:
    """The plain types that a field takes: ``int | None`` -> {int, NoneType}, ``list[str]`` -> {list}."""
    if annotation is None:
        return {NoneType}
    origin = get_origin(annotation)
    if origin is Annotated:
        return choices(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return set().union(*(choices(part) for part in get_args(annotation)))
    if origin is Literal:
        return {type(choice) for choice in get_args(annotation)}
    return {origin or annotation}


def get(tree: Any, key: str) -> Any:
    """The value at a dotted key of nested dicts; ABSENT where there is none."""
    for name in key.split("."):
        if not isinstance(tree, Mapping) or name not in tree:
            return ABSENT
        tree = tree[name]
    return tree


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted key, making the dicts on the way."""
    *parents, last = key.split(".")
    for name in parents:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[last] = value


def plain(tree: Any) -> Any:
    """A copy of nested dicts and sections as dicts. Of a section, only the values that were set."""
    if isinstance(tree, BaseModel):
        return tree.model_dump(exclude_unset=True)
    return {key: plain(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def defaults_of(model: type[BaseModel]) -> dict[str, Any]:
    """All defaults as nested dicts. A default from another key is a reference, a required key is MISSING."""
    tree: dict[str, Any] = {}
    derived: dict[str, str] = getattr(model, "derived", {})
    for key, field in keys_of(model).items():
        default = MISSING if field.is_required() else field.default
        put(tree, key, derived.get(key, list(default) if isinstance(default, tuple) else default))
    return tree
