"""``python -m verl.config.loading.docs`` writes ``docs/config.md``, the reference of all keys, from their classes."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from verl.config.loading.aliases import PER_RANK, RENAMED, REVALUED, WITHOUT_EFFECT
from verl.config.loading.describe import wanted
from verl.config.loading.help import MODULES, default_of
from verl.config.loading.schema import keys_of, sections_of
from verl.config.sections.models import Root

HEAD = """# Configuration

Made from the classes in `verl/config/` by `make docs`; change those, not this page.

Settings are given as `key=value` in [Hydra's override syntax](https://hydra.cc/docs/advanced/override_grammar/basic/),
and in YAML files with `--config FILE.yaml` (as many as you like). Later files win over earlier ones, and the command
line over files. `key=null` is "none", `~key` takes a key back to its default, and `${another.key}` stands for another
key's value (in a shell, in single quotes). A key that is misspelt, does not fit or is missing stops the run before it
starts, together with all other problems; `--help WORD` shows the keys with that word, and `trainer.dry_run=True` the
plan of the run.
"""


def config_page() -> str:
    """The text of docs/config.md."""
    parts = [HEAD]
    for schema, module in MODULES.items():
        parts.append(f"## `python3 -m {module}`\n")
        parts += [_section(schema, name, section) for name, section in sections_of(schema).items()]
    parts.append(_other_names())
    return "\n".join(part for part in parts if part)


def _section(schema: type[Root], name: str, section: type[BaseModel]) -> str:
    keys = {key: field for key, field in keys_of(schema).items() if key.rpartition(".")[0] == name}
    if not keys:
        return ""
    lines = [f"### {name}\n", "| key | default | takes | meaning |", "|---|---|---|---|"]
    for key, field in keys.items():
        cells = [f"`{key.rpartition('.')[2]}`", f"`{default_of(schema, key)}`", wanted(field), field.description or ""]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _other_names() -> str:
    lines = ["## Names and values of other versions\n", "Accepted, each with a notice.\n"]
    lines += ["| given | read as |", "|---|---|"]
    lines += [f"| `{old}` | `{new}` |" for old, new in RENAMED.items()]
    lines += [f"| `{key}={old}` | `{key}={new}` |" for (key, old), new in REVALUED.items()]
    lines += [
        f"| `{old}` (over all ranks) | `{new}`, divided over the ranks, at least 1 |" for old, new in PER_RANK.items()
    ]
    lines += [f"| `{key}` | nothing: {why} |" for key, why in WITHOUT_EFFECT.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    page = Path(__file__).parents[3] / "docs" / "config.md"
    page.write_text(config_page())
    print(f"wrote {page}")
