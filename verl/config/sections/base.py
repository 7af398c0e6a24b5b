"""What every section of the configuration is, and the types that several of them use."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, Predicate
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A group of keys. Unknown keys are refused, numbers are finite, and nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


def derived(description: str, **bounds: Any) -> Any:
    """A field whose default comes from another key: see ``DERIVED`` in verl.config.sections.models."""
    return Field(None, description=description, **bounds)


def as_list(value: Any) -> Any:
    """A single value where a list is wanted is a list of one; null is the empty list."""
    if value is None:
        return []
    return [value] if isinstance(value, str | int | float) else value


Strings = Annotated[list[str], BeforeValidator(as_list)]
Integers = Annotated[list[int], BeforeValidator(as_list)]
PositiveInt = Annotated[int, Ge(1)]
CountOrAll = Annotated[int, Ge(-1), Predicate(bool)]  # -1: all; 0 would mean nothing useful
Share = Annotated[float, Ge(0), Le(1)]

AggregationMode = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
KLKind = Literal["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"]
DType = Literal["auto", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]
