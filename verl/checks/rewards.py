"""Checks of scoring: the user's own function, which is not run, or the scorers of the data sources."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from verl.findings import Findings
from verl.reward.scorers import HOW_TO_NAME_ONE, SCORERS, scorer_of, settings_of

if TYPE_CHECKING:
    from verl.config.sections.models import RewardConfig


def check_reward_function(findings: Findings, path: str, name: str, arguments: Sequence[str]) -> None:
    """Checks that the file is Python and that its function takes these keyword arguments. The file is parsed and not
    imported: an import may take long, and the run does it."""
    try:
        module = ast.parse(Path(path).expanduser().read_bytes())
    except OSError as error:
        findings.problem(
            "custom_reward_function.path", path, f"it cannot be read ({error.strerror})", "name a Python file"
        )
        return
    except (SyntaxError, ValueError) as error:
        fix = "run python3 on that file to see where"
        findings.problem("custom_reward_function.path", path, f"it is not valid Python ({error})", fix)
        return
    names = _names(module)
    if name in names or "*" in names:
        function = next((node for node in reversed(module.body) if _binds(node, name)), None)
        if (
            isinstance(function, ast.FunctionDef)
            and not function.decorator_list
            and (why := _refuses(function.args, arguments))
        ):
            fix = f"write it as {name}({', '.join(arguments)}), with defaults or **kwargs for what it has no use for"
            findings.problem("custom_reward_function.name", name, f"it {why}", fix)
        return
    close = difflib.get_close_matches(name, names, n=1)
    fix = f"set it to {close[0]}" if close else f"the file has {', '.join(sorted(names)) or 'no function'}"
    findings.problem("custom_reward_function.name", name, f"{path} has no function of this name", fix)


def _binds(node: ast.AST, name: str) -> bool:
    """Whether this statement, or one inside it, may define the name."""
    bound = set[str]()
    for each in ast.walk(node):
        match each:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                bound.add(each.name)
            case ast.Name(ctx=ast.Store()):
                bound.add(each.id)
            case ast.alias():
                bound.add(each.asname or each.name)
    return not bound.isdisjoint({name, "*"})


def _refuses(taken: ast.arguments, given: Sequence[str]) -> str:
    """Why a call with only these keyword arguments would fail; empty if it would not."""
    by_place = taken.posonlyargs + taken.args
    required = by_place[: len(by_place) - len(taken.defaults)]
    required += [argument for argument, default in zip(taken.kwonlyargs, taken.kw_defaults, strict=True) if not default]
    named = {argument.arg for argument in taken.args + taken.kwonlyargs}
    if wanted := [argument.arg for argument in required if argument.arg not in named.intersection(given)]:
        return f"wants {', '.join(wanted)}, which it is not given"
    if unknown := [] if taken.kwarg else [name for name in given if name not in named]:
        return f"is given {', '.join(unknown)}, which it does not take"
    return ""


def _names(module: ast.Module) -> set[str]:
    """The names that a module defines or imports at its top level; with "*" if there may be others."""
    names: set[str] = set()
    for node in module.body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                names.update(alias.asname or alias.name for alias in aliases)
            case ast.Assign(targets=targets):
                names.update(target.id for target in targets if isinstance(target, ast.Name))
            case ast.Expr():
                pass
            case _:
                names.add("*")  # a definition may be below an if or try
    return names


def check_scoring(
    findings: Findings,
    reward: RewardConfig,
    files: Mapping[str, list[str]],
    column: str,
    dry_run: bool,
    set_keys: frozenset[str],
) -> None:
    """Checks that every data source has a scorer that can run on this machine, and warns of settings of scorers that
    nothing uses. It skips files that cannot be read.

    files: by the key that names them. column: the one with the data sources.
    """
    for source, name in reward.data_sources.items():
        if name not in SCORERS and ":" not in name:
            close = difflib.get_close_matches(name, SCORERS, n=1)
            fix = f"did you mean {close[0]}?" if close else f"name one of {', '.join(SCORERS)}, or module:function"
            findings.problem(f"reward.data_sources.{source}", name, "there is no scorer of this name", fix)
    examples = dict[str | None, str]()  # a data source of each scorer
    all_known = True
    for key, paths in files.items():
        sources = _values(paths, column)
        all_known &= bool(sources)
        examples |= {scorer_of(source, reward.data_sources): str(source) for source in sources}
        if unknown := sorted(str(source) for source in sources if scorer_of(source, reward.data_sources) is None):
            why = f"no scorer is known for the data source {', '.join(unknown)} (column {column!r})"
            findings.problem(key, paths, why, HOW_TO_NAME_ONE)
    names = set(examples)
    longest = reward.code.total_seconds + reward.code.limits.wall_seconds
    if "code" in names and longest >= reward.timeout:
        why = f"tests may take reward.code.total_seconds + reward.code.limits.wall_seconds = {longest:g} seconds"
        findings.problem("reward.timeout", reward.timeout, why, f"set it to {longest + 5:g}, or those lower")
    for name in sorted(SCORERS.keys() - names) if all_known else ():
        for key in sorted(key for key in set_keys if key.startswith(f"reward.{name}.")):
            findings.warn(f"{key} has no effect: no data source of this run is scored by {name} (column {column!r}).")
    settings = settings_of(reward)
    for name in sorted(SCORERS.keys() & names):
        if lack := SCORERS[name].missing(**settings[name]):
            if dry_run and name != "judge":
                findings.cannot_check(f"scorer {name}: {lack.why}; a run needs it")
            else:
                findings.problem(f"reward.data_sources.{examples[name]}", name, *lack)


def _values(files: list[str], column: str) -> set[str | None]:
    found: set[str | None] = set()
    for file in files:
        try:
            found.update(pq.read_table(Path(file).expanduser(), columns=[column])[column].unique().to_pylist())
        except (OSError, KeyError, pa.ArrowException):
            return set()
    return found
