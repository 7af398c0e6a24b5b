"""``python -m verl.config.loading.docs`` writes ``docs/config.md``, the reference of all keys, from the section
classes."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from verl.config.loading.aliases import PER_RANK, RENAMED, REVALUED, WITHOUT_EFFECT
from verl.config.loading.describe import effect, wanted
from verl.config.loading.help import MODULES, default_of
from verl.config.loading.schema import conditions_of, keys_of, sections_of
from verl.config.sections.models import Root

HEAD = """# Configuration

This page is generated from the classes in `verl/config/` by `make docs`. Change the classes, not this page.

- Settings are given as `key=value` in
  [Hydra's override syntax](https://hydra.cc/docs/advanced/override_grammar/basic/), and in YAML files with
  `--config FILE.yaml`, which may be repeated. Later files win over earlier ones. The command line wins over files.
- `key=null` means "none". `~key` resets a key to its default. `${another.key}` is the value of another key; in a shell,
  put it in single quotes.
- A key that is misspelt, missing or has a wrong value stops the run before it starts. All problems are reported
  together.
- A key that was set and has no effect in the run is named in a warning. The tables say when a key has no effect.
- `--help WORD` shows the keys that contain a word. `trainer.dry_run=True` prints the plan of the run.
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
    """A table of the section's keys. A condition that holds for all of them stands above it."""
    keys = {key: field for key, field in keys_of(schema).items() if key.rpartition(".")[0] == name}
    if not keys:
        return ""
    effects = {key: [effect(*found) for found in conditions_of(schema, key)] for key in keys}
    shared = [text for text in next(iter(effects.values())) if all(text in found for found in effects.values())]
    lines = [f"### {name}\n"] + ([" ".join(shared) + "\n"] if shared else [])
    lines += ["| key | default | takes | meaning |", "|---|---|---|---|"]
    for key, field in keys.items():
        meaning = " ".join([field.description or "", *(text for text in effects[key] if text not in shared)])
        cells = [f"`{key.rpartition('.')[2]}`", f"`{default_of(schema, key)}`", wanted(field), meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _other_names() -> str:
    lines = ["## Names and values of other versions\n", "These are accepted. Each prints a notice.\n"]
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
