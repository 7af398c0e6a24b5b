"""The text of ``--help``."""

from __future__ import annotations

from verl.config.loading.describe import effect, wanted
from verl.config.loading.names import nearest
from verl.config.loading.problems import shown
from verl.config.loading.schema import conditions_of, keys_of
from verl.config.sections.models import Config, EvalConfig, GenerationConfig, Root, SFTConfig

USAGE = """usage: python3 -m {module} [--config FILE.yaml ...] [key=value ...]

Required: {required}.
--help WORD ... shows the keys that contain one of the words, with their meaning and default. docs/config.md lists all.
trainer.dry_run=True checks everything, prints the plan of the run and stops."""

MODULES: dict[type[Root], str] = {
    Config: "verl.trainer.main_ppo",
    SFTConfig: "verl.trainer.main_sft",
    GenerationConfig: "verl.trainer.main_generation",
    EvalConfig: "verl.trainer.main_eval",
}


def default_of(schema: type[Root], key: str) -> str:
    """The default as text: a reference if it is another key's value."""
    if key in schema.derived:
        return schema.derived[key]
    field = keys_of(schema)[key]
    return "required" if field.is_required() else shown(field.default)


def help_text(schema: type[Root], words: list[str]) -> str:
    if not words:
        required = [key for key in keys_of(schema) if default_of(schema, key) == "required"]
        return USAGE.format(module=MODULES[schema], required=", ".join(required))
    entries = []
    for key, field in keys_of(schema).items():
        if any(word in key for word in words):
            entries.append(f"{key}={default_of(schema, key)}\n    {wanted(field)}. {field.description}")
            entries += [f"    {effect(*found)}" for found in conditions_of(schema, key)]
    if not entries:
        return f"no key contains {' or '.join(words)}; the nearest is {nearest(words[0], keys_of(schema))}"
    return "\n".join(entries)
