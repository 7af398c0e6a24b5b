"""Merges settings from files and the command line, under the names used here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel

from verl.config.loading.aliases import canonical
from verl.config.loading.names import nearest
from verl.config.loading.overrides import Override
from verl.config.loading.problems import NO_VALUE, Problem
from verl.config.loading.schema import choices, get, keys_of, put, sections_of

COMMAND_LINE = "the command line"
SET_BY_USER = "set_by_user"  # entry of a run's resolved configuration: the keys that the user set


@dataclass(frozen=True)
class Origin:
    """Where a key's value came from. layer: COMMAND_LINE or the file. given: the name used there. text: the value as
    typed. per_rank: the value is for all ranks together. default: the file has it as a default that nobody set."""

    layer: str
    given: str
    text: str | None = None
    per_rank: bool = False
    default: bool = False


@dataclass
class Settings:
    """tree: values as nested dicts. origins: the origin of every key in it."""

    schema: type[BaseModel]
    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def set_keys(self) -> frozenset[str]:
        return frozenset(key for key, origin in self.origins.items() if not origin.default)

    def apply(self, override: Override) -> None:
        if override.remove:
            self._remove(override.key)
            return
        for key, value in self._leaves(override.key, override.value):
            self._set(value, Origin(COMMAND_LINE, key, override.text if key == override.key else None))

    def apply_file(self, layer: str, content: Mapping[str, Any]) -> None:
        set_by_user = content.get(SET_BY_USER)
        for name, value in content.items():
            if name != SET_BY_USER:
                for key, leaf in self._leaves(name, value):
                    default = set_by_user is not None and key not in set_by_user
                    self._set(leaf, Origin(layer, key, default=default))

    def problem(self, key: str, value: Any, why: str, fix: str) -> None:
        self.problems.append(Problem(key, value, why, fix))

    def misfit(self, key: str, why: str, fix: str) -> None:
        """Adds a problem of a key that is set, with the name and value that the user gave."""
        origin = self.origins[key]
        self.problem(origin.given, get(self.tree, key) if origin.text is None else origin.text, why, fix)

    def _leaves(self, key: str, value: Any) -> Iterator[tuple[str, Any]]:
        """The keys that a mapping sets. A mapping may itself be the value of a key. A file's section may be empty."""
        name = canonical(key, value).key
        if isinstance(value, Mapping) and value and name not in keys_of(self.schema):
            for part, item in value.items():
                yield from self._leaves(f"{key}.{part}", item)
        elif name not in sections_of(self.schema) or value not in (None, {}):
            yield key, value

    def _set(self, value: Any, origin: Origin) -> None:
        found = canonical(origin.given, value)
        if found.notice:
            self.notices.append(found.notice)
        if found.key is None or (found.per_rank and value is None):
            return
        key = self._key_of(found.key)
        if key is None:
            self._unknown(origin.given, value)
            return
        origin = replace(origin, per_rank=found.per_rank)
        if key == found.key and self._second_name(key, found.value, origin):
            return
        old = get(self.tree, found.key)
        merged = {**old, **found.value} if isinstance(old, dict) and isinstance(found.value, Mapping) else found.value
        put(self.tree, found.key, merged)
        self.origins[key] = origin

    def _key_of(self, name: str) -> str | None:
        """The schema's key: the name itself, or the key of a mapping that has it as an entry; None if there is none."""
        known = keys_of(self.schema)
        parts = name.split(".")
        prefixes = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
        key = next((prefix for prefix in prefixes if prefix in known), None)
        return key if key == name or (key and dict in choices(known[key].annotation)) else None

    def _second_name(self, key: str, value: Any, origin: Origin) -> bool:
        """Whether this layer already sets the key by another name, so that this value is not used. A null is replaced.
        Two different values are a problem."""
        before, old = self.origins.get(key), get(self.tree, key)
        if before is None or (before.layer, old) == (origin.layer, None) or before.layer != origin.layer:
            return False
        if before.given == origin.given or (old == value and before.per_rank == origin.per_rank):
            return False
        if value is not None:
            why = f"{before.given}={old} sets the same thing"
            self.problem(origin.given, value, why, f"give only one of the two; {key} is the name to keep")
        return True

    def _remove(self, given: str) -> None:
        key = canonical(given, None).key
        if key not in keys_of(self.schema):
            self._unknown(given, NO_VALUE)
        elif self.origins.pop(key, None):
            section, _, name = key.rpartition(".")
            del get(self.tree, section)[name]

    def _unknown(self, given: str, value: Any) -> None:
        if given in sections_of(self.schema):
            why, fix = "this is a group of keys", f"set the keys in it; --help {given} shows them"
        else:
            why = "there is no such key"
            fix = f"the nearest is {nearest(given, keys_of(self.schema))}; --help WORD shows the keys with that word"
        self.problem(given, value, why, fix)
