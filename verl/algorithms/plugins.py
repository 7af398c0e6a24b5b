"""Imports a function of the user, named by a key as ``package.module:function``."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable
from typing import Any

from verl.errors import UserError


def users_function(key: str, name: str, known: Iterable[str]) -> Callable[..., Any]:
    """The function that ``key=name`` names. known: the library's own names for this key.

    UserError if it cannot be imported or is not a function. If the name is not an import path, the error lists the
    known names.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(
            f"{key}={name} is not one of {', '.join(names)}.{hint} "
            "A function of your own is written package.module:function."
        )
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{key}={name} cannot be imported: {error}. "
            "It is written package.module:function; the package must be on PYTHONPATH."
        ) from error
    if not callable(function):
        raise UserError(f"{key}={name} is not a function but {function!r}.")
    return function
