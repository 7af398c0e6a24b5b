"""What the conformance suite found of each engine on a CPU, kept in records/, and the table in docs/engines.md that is
made of it. After a change of the suite, or of an engine:

    .venv/bin/python -m pytest tests/conformance -k hf --record
    .venv-sglang/bin/python -m pytest tests/conformance -k sglang --record
    .venv-vllm/bin/python -m pytest tests/conformance -k vllm --record
    make docs
"""

from __future__ import annotations

import ast
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

FOLDER = Path(__file__).with_name("records")
SUITE = Path(__file__).with_name("test_rollout_contract.py")
PAGE = Path(__file__).parents[2] / "docs" / "engines.md"
START, END = "<!-- made by tests/conformance/records.py -->\n", "<!-- until here -->\n"

HOLDS = "yes"


@dataclass
class Record:
    """Of one kit. engine: as rollout.name has it. version: of the package that draws. how: it ran.
    found: of a test, by its name, ``HOLDS`` or the reason for which it was skipped."""

    engine: str
    version: str
    how: str
    found: dict[str, str] = field(default_factory=dict)


def path_of(kit: str) -> Path:
    return FOLDER / f"{kit.replace(', ', '-').replace(' ', '-')}.json"


def read(path: Path) -> Record:
    return Record(**json.loads(path.read_text()))


def write(record: Record, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(asdict(record), indent=1, sort_keys=True) + "\n")


def statements() -> dict[str, tuple[str, str]]:
    """Of each test of the suite: the part of the table, and what holds."""
    found = {}
    for node in ast.parse(SUITE.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            part, _, statement = (ast.get_docstring(node) or "").removesuffix(".").partition(": ")
            found[node.name] = part, statement
    return found


def table() -> str:
    """A column for each engine; where its records differ, the cell says so."""
    engines: dict[str, list[Record]] = {}
    for path in sorted(FOLDER.glob("*.json"), key=lambda path: path.stem):
        record = read(path)
        engines.setdefault(record.engine, []).append(record)
    lines = [f"- `{engine}`: {_ran(records)}" for engine, records in engines.items()]
    lines += ["", f"| | {' | '.join(f'`{engine}`' for engine in engines)} |", "|---" * (len(engines) + 1) + "|"]
    rows = statements()
    for part in dict.fromkeys(part for part, _ in rows.values()):
        lines.append(f"| **{part}** |" + " |" * len(engines))
        for test, (of, statement) in rows.items():
            if of == part:
                cells = (_cell(test, records) for records in engines.values())
                lines.append(f"| {statement} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _ran(records: list[Record]) -> str:
    (version,) = {record.version for record in records}
    return f"{version}, {' and '.join(record.how for record in records)}"


def _cell(test: str, records: list[Record]) -> str:
    found = {record.how: record.found[test] for record in records}
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    return "; ".join(f"{how}: {what}" for how, what in found.items())


def page() -> str:
    """docs/engines.md with the table as the records have it."""
    before, _, rest = PAGE.read_text().partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page())
