"""Checks of how responses will be scored: the user's own function, without running it, or the data sources' scorers."""

from __future__ import annotations

import ast
import difflib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from verl.checks.findings import Findings
from verl.reward.scorers import DATA_SOURCES


def check_reward_function(findings: Findings, path: str, name: str) -> None:
    """The file is Python and has the function. It is not imported: that may take long, and the run does it."""
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
        return
    close = difflib.get_close_matches(name, names, n=1)
    fix = f"set it to {close[0]}" if close else f"the file has {', '.join(sorted(names)) or 'no function'}"
    findings.problem("custom_reward_function.name", name, f"{path} has no function of this name", fix)


def _names(module: ast.Module) -> set[str]:
    """What a module defines or imports at its top level; "*" where that cannot be told."""
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


def check_data_sources(findings: Findings, key: str, files: list[str], column: str) -> None:
    """Every data source named in this column has a scorer. Files that cannot be read are not this check's business."""
    found: set[str] = set()
    for file in files:
        try:
            found.update(pq.read_table(Path(file).expanduser(), columns=[column])[column].unique().to_pylist())
        except (OSError, KeyError, pa.ArrowException):
            return
    if unknown := sorted(str(source) for source in found if source not in DATA_SOURCES):
        known = ", ".join(DATA_SOURCES)
        findings.problem(
            key,
            files,
            f"no scorer is known for the data source {', '.join(unknown)} (column {column!r}; known: {known})",
            "name a function of your own: custom_reward_function.path=FILE.py",
        )
