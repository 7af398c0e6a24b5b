"""The base class of configuration sections, and types that several sections use."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, Predicate
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A group of keys. It rejects unknown keys and numbers that are not finite, and cannot be changed."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


def derived(description: str, **bounds: Any) -> Any:
    """A field whose default is another key's value. ``Root.derived`` in verl.config.sections.models names that key."""
    return Field(None, description=description, **bounds)


def as_list(value: Any) -> Any:
    """A list: a single value becomes a list of one, null the empty list."""
    if value is None:
        return []
    return [value] if isinstance(value, str | int | float) else value


Strings = Annotated[list[str], BeforeValidator(as_list)]
Integers = Annotated[list[int], BeforeValidator(as_list)]
PositiveInt = Annotated[int, Ge(1)]
CountOrAll = Annotated[int, Ge(-1), Predicate(bool)]  # -1 is "all"; 0 has no use and is rejected
Share = Annotated[float, Ge(0), Le(1)]

AggregationMode = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
KLKind = Literal["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"]
DType = Literal["auto", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]
