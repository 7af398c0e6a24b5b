"""Which keys of the configuration the library reads, by mypy's types.

``owner.name`` reads the key ``name`` of the section class of ``owner``. A key of the same name in another class is not
read by it. A class that several sections share is not told apart: a read counts for all of them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

from mypy import build, options
from mypy.modulefinder import BuildSource
from mypy.nodes import MemberExpr
from mypy.types import Instance, Type, TypeVarType, UnionType, get_proper_type

import verl
from verl.config.loading.schema import sections_of
from verl.config.sections.models import Root

PACKAGE = Path(verl.__file__).parent

Reads = frozenset[tuple[str, str]]  # (full name of a class, name of an attribute)


def reads_of_library() -> Reads:
    """All attributes that the library reads, apart from the checks: to judge a value gives it no effect.

    mypy does not follow other packages here, so that it needs seconds. Their types are unknown.
    """
    chosen = options.Options()
    chosen.incremental, chosen.export_types, chosen.check_untyped_defs = False, True, True
    chosen.follow_imports, chosen.ignore_missing_imports = "skip", True
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] != "checks"]
    result = build.build([BuildSource(str(path), module_of(path), None) for path in paths], chosen)
    members = [node for node in result.types if isinstance(node, MemberExpr)]
    return frozenset((owner, node.name) for node in members for owner in classes(result.types.get(node.expr)))


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def classes(kind: Type | None) -> Iterator[str]:
    """The full names of the classes that a value of this type may be of."""
    if kind is None:
        return
    kind = get_proper_type(kind)
    if isinstance(kind, UnionType):
        for item in kind.items:
            yield from classes(item)
    elif isinstance(kind, TypeVarType):
        yield from classes(kind.upper_bound)
    elif isinstance(kind, Instance):
        yield kind.type.fullname


def unread(schema: type[Root], reads: Reads, otherwise: frozenset[str] = frozenset()) -> set[str]:
    """The keys and sections of a configuration that nothing reads. otherwise: dotted names that are read, but not as an
    attribute."""
    found = set()
    for path, section in {"": schema, **sections_of(schema)}.items():
        for name in section.model_fields:
            dotted = f"{path}.{name}".lstrip(".")
            if dotted not in otherwise and not is_read(section, name, reads):
                found.add(dotted)
    return found


def is_read(section: type, name: str, reads: Reads) -> bool:
    """Whether code reads the field through the section's class, a base class of it, or a protocol that it fits."""
    owners = {f"{base.__module__}.{base.__qualname__}" for base in section.__mro__}
    owners |= {owner for owner, read in reads if read == name and fits(section, owner)}
    return any((owner, name) in reads for owner in owners)


def fits(section: type, owner: str) -> bool:
    """Whether ``owner`` is one of our protocols, all of whose properties are fields of the section."""
    module, _, name = owner.rpartition(".")
    if not module.startswith("verl."):
        return False
    protocol = getattr(importlib.import_module(module), name, None)
    if not getattr(protocol, "_is_protocol", False):
        return False
    members = {member for member, value in vars(protocol).items() if isinstance(value, property)}
    return bool(members) and members <= section.model_fields.keys()
