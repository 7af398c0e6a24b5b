"""The values that a key takes and the conditions under which it has no effect, in words: for the documentation,
``--help`` and the message about a wrong value."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from verl.config.loading.problems import shown
from verl.config.sections.effects import Condition, NoEffect, always

WORDS = {int: "whole number", float: "number", str: "text", bool: "True or False", dict: "mapping", NoneType: "null"}
BOUNDS = {
    annotated_types.Ge: lambda bound: f"at least {bound.ge}",
    annotated_types.Gt: lambda bound: f"over {bound.gt}",
    annotated_types.Le: lambda bound: f"at most {bound.le}",
    annotated_types.Lt: lambda bound: f"under {bound.lt}",
    annotated_types.Predicate: lambda bound: "not 0",
    annotated_types.MinLen: lambda bound: f"{bound.min_length} or more",
}


def wanted(field: FieldInfo) -> str:
    """The values that a field takes, such as "whole number, at least 1, or null"."""
    return _words(field.annotation, field.metadata)


def effect(section: str, condition: Condition) -> str:
    """A condition as a sentence. section: dotted name of the section that holds it."""
    if not isinstance(condition, NoEffect):
        return f"No effect if {condition.choice} does not read it."
    joint = ":" if condition.when is always else " if"
    return f"No effect{joint} {condition.why.replace('{section}', section)}."


def _words(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0], [*arguments[1:], *metadata])
    if origin in (Union, UnionType):
        text = " or ".join(_words(part) for part in arguments)
        text = text.replace(" or null", ", or null") if "," in text or " or " in text.removesuffix(" or null") else text
    elif origin is Literal:
        text = _alternatives([shown(choice) for choice in arguments])
    elif origin is list:
        text = f"list of {_words(arguments[0])}".replace("list of text", "list of texts").replace("number", "numbers")
    elif origin is tuple:
        text = f"list of {len(arguments)}, each a {_words(arguments[0])}"
    else:
        text = WORDS.get(origin or annotation, str(annotation))
    bounds = [BOUNDS[type(item)](item) for item in metadata if type(item) in BOUNDS]
    return ", ".join([text, *bounds])


def literals(annotation: Any) -> list[str]:
    """The words that a key takes if it takes only certain words, else nothing."""
    return [choice for choice in get_args(annotation) if get_origin(annotation) is Literal and isinstance(choice, str)]


def _alternatives(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
