"""Checks of data files (only their parquet footers are read), output folders and free disk space."""

from __future__ import annotations

import difflib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from verl.findings import Findings
from verl.units import gigabytes, some


def check_parquet(findings: Findings, key: str, files: str | Sequence[str], columns: dict[str, str]) -> int | None:
    """The total number of rows; None if a file cannot be read. Checks that every file exists and has every column.

    columns: dotted column name ("reward_model.ground_truth" is a field of a struct) -> what to do if it is missing.
    """
    counts = [_check_one(findings, key, file, columns) for file in paths(files)]
    if not counts or None in counts:
        return None
    rows = sum(count for count in counts if count is not None)
    if rows == 0:
        findings.problem(key, files, "the data set has no rows", "write the data set again, or name another file")
        return None
    return rows


def paths(files: str | Sequence[str] | None) -> list[str]:
    if files is None:
        return []
    return [files] if isinstance(files, str) else list(files)


def _check_one(findings: Findings, key: str, file: str, columns: dict[str, str]) -> int | None:
    path = Path(file).expanduser()
    if path.is_dir():
        inside = sorted(entry.name for entry in path.glob("*.parquet"))
        fix = f"name the files in it: {some(inside)}" if inside else "name a parquet file"
        findings.problem(key, file, "this is a folder, not a parquet file", fix)
        return None
    if not path.is_file():
        findings.problem(key, file, "there is no such file", _nearest(path))
        return None
    try:
        footer = pq.read_metadata(path)
    except (pa.ArrowInvalid, OSError) as error:
        findings.problem(key, file, f"this cannot be read as parquet ({_first_line(error)})", "name a parquet file")
        return None
    schema = footer.schema.to_arrow_schema()
    for column, fix in columns.items():
        if not _has(schema, column):
            findings.problem(key, file, f"there is no column {column!r} (its columns: {some(_leaves(schema))})", fix)
    return footer.num_rows


def _has(schema: pa.Schema, column: str) -> bool:
    fields: pa.Schema | pa.DataType = schema
    for name in column.split("."):
        if not (isinstance(fields, pa.Schema) or pa.types.is_struct(fields)):
            return False
        index = fields.get_field_index(name)
        if index < 0:
            return False
        fields = fields.field(index).type
    return True


def _leaves(schema: pa.Schema) -> list[str]:
    names = []
    for field in schema:
        if pa.types.is_struct(field.type):
            names += [f"{field.name}.{inner.name}" for inner in field.type]
        else:
            names.append(field.name)
    return names


def _nearest(path: Path) -> str:
    """A similar name in the same folder, or the part of the path that exists."""
    parent = existing_ancestor(path)
    if parent != path.parent:
        return f"its folder does not exist either; the path exists up to {parent}"
    names = sorted(entry.name for entry in parent.iterdir())
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if close:
        return f"the nearest name there is {parent / close[0]}"
    parquet = [name for name in names if name.endswith(".parquet")]
    return f"{parent} holds {some(parquet) if parquet else 'no parquet file'}"


def existing_ancestor(path: Path) -> Path:
    """The nearest folder above ``path`` that exists."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def check_output_folder(findings: Findings, key: str, folder: str, needed: int | None = None) -> None:
    """Checks that the folder exists or can be made, is writable and has ``needed`` bytes free. The folder's own
    checkpoints count as free space: they are part of what the run keeps."""
    path = Path(folder).expanduser().absolute()
    base = next(place for place in (path, *path.parents) if place.exists())
    if not base.is_dir():
        findings.problem(key, folder, f"{base} is a file, not a folder", "name a folder")
        return
    try:
        tempfile.TemporaryFile(dir=base).close()
    except OSError as error:
        why = f"{base} cannot be written to ({error.strerror})"
        findings.problem(key, folder, why, "name a folder that you can write to")
        return
    free = shutil.disk_usage(base).free
    free += sum(file.stat().st_size for file in path.glob("global_step_*/**/*") if file.is_file())
    if needed is not None and free < needed:
        findings.problem(
            key,
            folder,
            f"checkpoints take about {gigabytes(needed)} and the disk has {gigabytes(free)} free",
            "free some space, keep fewer (trainer.max_ckpt_to_keep), or name a folder on another disk",
        )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
