"""Which function scores a sample: the data source's own, or the user's from a file. Runs in the scoring processes."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl.errors import UserError
from verl.reward import gsm8k
from verl.reward.pool import traceback_tail

# compute_score(data_source=, solution_str=, ground_truth=, extra_info=, **kwargs) -> a number, or a dict with "score"
Scorer = Callable[..., Any]

SCORERS: dict[str, Scorer] = {"gsm8k": gsm8k.compute_score}  # also the name of its settings: reward.gsm8k

DATA_SOURCES = {"openai/gsm8k": "gsm8k", "verl/arithmetic": "gsm8k"}


@dataclass(frozen=True)
class ScorerSpec:
    """Picklable. path: the user's file ("": by data source). kwargs: the user's, or {scorer name: its settings}."""

    path: str = ""
    name: str = "compute_score"
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def make_scorer(spec: ScorerSpec) -> Callable[[dict[str, Any]], tuple[float, str]]:
    """sample (compute_score's four arguments, extra_info as JSON text) -> (score, JSON object of the other values)."""
    users = load_function(spec) if spec.path else None

    def score(sample: dict[str, Any]) -> tuple[float, str]:
        arguments = {**sample, "extra_info": json.loads(sample["extra_info"])}
        if users is not None:
            return parse(users(**arguments, **spec.kwargs))
        name = DATA_SOURCES[sample["data_source"]]
        return parse(SCORERS[name](**arguments, **spec.kwargs.get(name, {})))

    return score


def check_data_sources(names: set[str | None]) -> None:
    """UserError for those that no scorer is known for."""
    if unknown := sorted(str(name) for name in names if name not in DATA_SOURCES):
        raise UserError(
            f"no scorer is known for the data source {' or '.join(map(repr, unknown))}, only for "
            f"{', '.join(map(repr, DATA_SOURCES))}. Name a function of your own: custom_reward_function.path=FILE.py"
        )


def parse(answer: Any) -> tuple[float, str]:
    """What a scorer returned -> (score, JSON object of the other values); ValueError without a finite score."""
    values = dict(answer) if isinstance(answer, Mapping) else {"score": answer}
    if "score" not in values:
        raise ValueError(f'the dict that the reward function returned has no "score"; its keys: {sorted(values)}')
    score = plain(values.pop("score"))
    if isinstance(score, str | list | dict) or score is None or not math.isfinite(score):
        raise ValueError(
            f'the reward function must return a finite number or a dict with one as "score", not {answer!r}'
        )
    return float(score), json.dumps({str(key): plain(value) for key, value in values.items()}, ensure_ascii=False)


def plain(value: Any) -> Any:
    """As JSON has it: arrays and tensors as lists or numbers, numbers not finite as null, the unknown as its str."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(inner) for inner in value]
    if callable(getattr(value, "tolist", None)):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def load_function(spec: ScorerSpec) -> Scorer:
    """The user's function; UserError, naming the key to mend, when it cannot be had or called."""
    path = Path(spec.path)
    where = f"custom_reward_function.path={path}"
    if not path.is_file():
        raise UserError(f"{where}: there is no such file")
    loader = importlib.util.spec_from_file_location("verl_custom_reward_function", path)
    if loader is None or loader.loader is None:
        raise UserError(f"{where} is not a Python file (.py)")
    module = importlib.util.module_from_spec(loader)
    sys.modules[module.__name__] = module
    sys.path.append(str(path.parent))  # the file may import its neighbours
    try:
        loader.loader.exec_module(module)
    except BaseException as error:
        raise UserError(f"{where} cannot be imported:\n{traceback_tail(error)}") from error
    function = getattr(module, spec.name, None)
    if not callable(function):
        names = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        near = difflib.get_close_matches(spec.name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"its functions: {', '.join(names) or 'none'}"
        raise UserError(f"{where} has no function custom_reward_function.name={spec.name}; {hint}")
    arguments = dict.fromkeys(["data_source", "solution_str", "ground_truth", "extra_info", *spec.kwargs])
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise UserError(
            f"{where}: {spec.name}{inspect.signature(function)} cannot be called with the keyword arguments "
            f"{', '.join(arguments)} (those after extra_info from custom_reward_function.reward_kwargs): {error}"
        ) from error
    return function
