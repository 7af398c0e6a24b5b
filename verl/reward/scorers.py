"""Which function scores a sample: the data source's own, or the user's from a file. Runs in the scoring processes."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl.errors import UserError
from verl.reward import code_tests, exact_match, gsm8k, json_match, judge, math_dapo, multiple_choice, symbolic_math
from verl.reward.dependencies import MissingDependency
from verl.reward.pool import traceback_tail

if TYPE_CHECKING:
    from verl.config.sections.models import RewardConfig

# compute_score(data_source=, solution_str=, ground_truth=, extra_info=, **kwargs) -> a number, or a dict with "score"
Scorer = Callable[..., Any]
ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")


@dataclass(frozen=True)
class BuiltIn:
    """compute_score: None of the judge, which is not a function to be run (``verl.reward.judge``).
    missing(**settings): what is lacking to run it here, or None."""

    compute_score: Scorer | None
    missing: Callable[..., MissingDependency | None] = lambda **settings: None


# A scorer's settings, if it has any, are the section of its name: reward.gsm8k.
SCORERS: dict[str, BuiltIn] = {
    "gsm8k": BuiltIn(gsm8k.compute_score),
    "math": BuiltIn(symbolic_math.compute_score, symbolic_math.missing),
    "math_dapo": BuiltIn(math_dapo.compute_score),
    "multiple_choice": BuiltIn(multiple_choice.compute_score),
    "exact_match": BuiltIn(exact_match.compute_score),
    "json_match": BuiltIn(json_match.compute_score),
    "code": BuiltIn(code_tests.compute_score, code_tests.missing),
    "judge": BuiltIn(None, judge.missing),
}

# Patterns of data sources, and the scorer of each. A scorer's own name is one, too.
DATA_SOURCES = {
    "openai/gsm8k": "gsm8k",
    "verl/arithmetic": "gsm8k",
    "lighteval/MATH": "math",
    "DigitalLearningGmbH/MATH-lighteval": "math",
    "HuggingFaceH4/MATH-500": "math",
    "numina_*": "math",
    "math_dapo*": "math_dapo",
    "aime*": "math_dapo",
    "apps": "code",
    "taco": "code",
    "codecontests": "code",
    "codeforces": "code",
}


@dataclass(frozen=True)
class ScorerSpec:
    """Picklable. path: the user's file ("": by data source). kwargs: the user's, or {scorer name: its settings}.
    data_sources: the user's own, see ``scorer_of``."""

    path: str = ""
    name: str = "compute_score"
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    data_sources: Mapping[str, str] = field(default_factory=dict)


def settings_of(config: RewardConfig) -> dict[str, dict[str, Any]]:
    """{scorer name: its settings}; nothing for a scorer that has no section in the configuration."""
    sections = {name: getattr(config, name, None) for name in SCORERS}
    return {name: section.model_dump() if section else {} for name, section in sections.items()}


def make_scorer(spec: ScorerSpec) -> Callable[[dict[str, Any]], tuple[float, str]]:
    """sample (compute_score's four arguments, extra_info as JSON text) -> (score, JSON object of the other values)."""
    users = load_function(spec) if spec.path else None
    imported = {name: import_scorer(name) for name in spec.data_sources.values() if ":" in name}

    def score(sample: dict[str, Any]) -> tuple[float, str]:
        arguments = {**sample, "extra_info": json.loads(sample["extra_info"])}
        if users is not None:
            return parse(users(**arguments, **spec.kwargs))
        name = scorer_of(sample["data_source"], spec.data_sources)
        assert name is not None  # the data sources were checked
        if name in imported:
            return parse(imported[name](**arguments))
        compute_score = SCORERS[name].compute_score
        assert compute_score is not None
        return parse(compute_score(**arguments, **spec.kwargs.get(name, {})))

    return score


def scorer_of(data_source: str | None, users: Mapping[str, str]) -> str | None:
    """The scorer's name, or "module:function"; None when none is known. users: patterns of the user's own data sources
    and their scorers, which come before ours; of several patterns that fit, the first counts."""
    if data_source is None:
        return None
    for pattern, name in (*users.items(), *DATA_SOURCES.items()):
        if fnmatchcase(data_source, pattern):
            return name
    return data_source if data_source in SCORERS else None


def scorers_of(data_sources: Iterable[str | None], users: Mapping[str, str]) -> list[str]:
    """The scorers of these data sources; UserError where there is none of a name."""
    found = {source: scorer_of(source, users) for source in data_sources}
    if unknown := sorted(str(source) for source, name in found.items() if name is None):
        raise UserError(f"no scorer is known for the data source {' or '.join(map(repr, unknown))}. {HOW_TO_NAME_ONE}")
    return sorted({name for name in found.values() if name is not None})


def check_scorers(names: Iterable[str], settings: Mapping[str, Mapping[str, Any]]) -> None:
    """UserError for one that cannot run on this machine. settings: {scorer name: its settings}."""
    for name in names:
        if name in SCORERS and (lack := SCORERS[name].missing(**settings[name])):
            raise UserError(str(lack))


HOW_TO_NAME_ONE = (
    f"Say which one is meant: reward.data_sources={{NAME: SCORER}}, a scorer being {', '.join(SCORERS)} or "
    "module:function; or name a function of your own: custom_reward_function.path=FILE.py"
)


def import_scorer(place: str) -> Scorer:
    """The function at "package.module:function"; UserError when it cannot be had."""
    where = f"reward.data_sources names the scorer {place}"
    module_name, _, function_name = place.partition(":")
    try:
        module = importlib.import_module(module_name)
    except BaseException as error:
        raise UserError(f"{where}, whose module cannot be imported:\n{traceback_tail(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{where}, but {module_name} has no function {function_name}")
    return function


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


def load_function(spec: ScorerSpec, names: Iterable[str] = ARGUMENTS) -> Scorer:
    """The user's function; UserError, naming the key to mend, when it cannot be had, or called with these arguments."""
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
    arguments = dict.fromkeys([*names, *spec.kwargs])
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise UserError(
            f"{where}: {spec.name}{inspect.signature(function)} cannot be called with the keyword arguments "
            f"{', '.join(arguments)} (those after the fourth from custom_reward_function.reward_kwargs): {error}"
        ) from error
    return function
