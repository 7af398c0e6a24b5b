"""Checkpoints of a run: written atomically, checked before use, and limited in number.

``global_step_N/`` gets its name only once all its files are on disk. Its ``manifest.json`` lists every file with
size and checksum. If a folder does not match its manifest, a warning names it, and the checkpoint before it is used.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from verl.errors import UserError

MANIFEST = "manifest.json"


class SaveError(UserError):
    """The checkpoint could not be written. Earlier checkpoints are unchanged."""


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    step: int

    def damage(self) -> str | None:
        """The first difference between the files and the manifest, or None."""
        try:
            files = json.loads((self.folder / MANIFEST).read_text())["files"]
        except (OSError, ValueError, KeyError) as error:
            return f"{MANIFEST} cannot be read ({error})"
        for name, (size, checksum) in files.items():
            path = self.folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes, not {size:,}"
            if crc32(path) != checksum:
                return f"{name} has changed since it was written (checksum)"
        return None

    def state(self) -> dict:
        return json.loads((self.folder / "trainer.json").read_text())

    @property
    def sound(self) -> bool:
        """False if the last optimizer step before it was skipped, or if it cannot be read."""
        try:
            return self.state().get("sound", True)
        except (OSError, ValueError):
            return False


class Checkpoints:
    """The checkpoints in a folder. keep: number of checkpoints to keep; None or 0 keeps all."""

    def __init__(self, folder: Path, keep: int | None = None):
        self.folder, self.keep = Path(folder), keep

    def all(self) -> list[Checkpoint]:
        """All checkpoints, oldest first."""
        found = [(path, re.fullmatch(r"global_step_(\d+)", path.name)) for path in self.folder.glob("global_step_*")]
        return sorted((Checkpoint(path, int(match[1])) for path, match in found if match), key=lambda c: c.step)

    def latest(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """The newest intact checkpoint, or None without checkpoints. ``warn`` gets a message about each damaged one.

        Raises UserError if all are damaged."""
        checkpoints = self.all()
        for checkpoint in reversed(checkpoints):
            damage = checkpoint.damage()
            if damage is None:
                return checkpoint
            warn(f"checkpoint {checkpoint.folder} is damaged: {damage}. The checkpoint before it is tried.")
        if checkpoints:
            raise UserError(
                f"all checkpoints in {self.folder} are damaged. "
                "To start from the beginning, move them away or set trainer.resume_mode=disable."
            )
        return None

    def at(self, path: Path) -> Checkpoint:
        """The checkpoint in this folder. Raises UserError if it is not one, or is damaged."""
        match = re.fullmatch(r"global_step_(\d+)", path.resolve().name)
        if not match or not path.is_dir():
            raise UserError(
                f"trainer.resume_from_path={path} is not a checkpoint: set it to a folder .../global_step_N"
            )
        checkpoint = Checkpoint(path, int(match[1]))
        if damage := checkpoint.damage():
            raise UserError(f"trainer.resume_from_path={path} is damaged: {damage}")
        return checkpoint

    def set_aside(self, after: int) -> Path | None:
        """The new folder that holds all checkpoints later than step ``after``, or None if there are none.

        They are moved so that a run that resumes at ``after`` neither overwrites them nor takes them for its own."""
        later = [checkpoint for checkpoint in self.all() if checkpoint.step > after]
        if not later:
            return None
        aside = next(folder for n in itertools.count(1) if not (folder := self.folder / f"set_aside_{n}").exists())
        aside.mkdir()
        for checkpoint in later:
            checkpoint.folder.rename(aside / checkpoint.folder.name)
        return aside

    def where_to_resume(self) -> str:
        """A sentence that names the newest checkpoint, for a run that cannot go on from what it has."""
        if kept := [checkpoint for checkpoint in self.all() if checkpoint.sound] or self.all():
            return f"The last checkpoint before that is {kept[-1].folder}"
        return "No checkpoint was written before that: start from the beginning"

    def save(self, step: int, write: Callable[[Path], None], state: dict) -> Checkpoint:
        """The saved checkpoint. ``write(folder)`` writes the models, and ``state`` becomes trainer.json.

        state["sound"]: False if the last optimizer step was skipped. Raises SaveError if a file cannot be written, for
        example on a full disk."""
        final, partial = self.folder / f"global_step_{step}", self.folder / f".partial_global_step_{step}"
        try:
            for left_over in self.folder.glob(".partial_global_step_*"):  # left by a run that was killed while saving
                shutil.rmtree(left_over)
            partial.mkdir(parents=True)
            write(partial)
            (partial / "trainer.json").write_text(json.dumps(state, indent=1))
            seal(partial, step)
            partial.rename(final)
            sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise SaveError(self._why_not(final, error)) from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._prune()
        return Checkpoint(final, step)

    def _why_not(self, final: Path, error: OSError) -> str:
        free = shutil.disk_usage(self.folder).free if self.folder.exists() else 0
        kept = self.all()
        safe = f"{kept[-1].folder} is unchanged" if kept else "there is no earlier checkpoint"
        return f"could not write {final}: {error.strerror or error} ({free / 1e6:,.0f} MB free there); {safe}"

    def _prune(self) -> None:
        """Deletes all but the newest ``keep``. Only a sound checkpoint takes the place of others, so the last sound one
        is always kept."""
        kept = self.all()
        if self.keep and kept[-1].sound:
            for checkpoint in kept[: -self.keep]:
                shutil.rmtree(checkpoint.folder)


def seal(folder: Path, step: int) -> None:
    """Write the manifest and flush all files to disk."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        files[str(path.relative_to(folder))] = [path.stat().st_size, crc32(path)]
    with (folder / MANIFEST).open("w") as file:
        json.dump({"step": step, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync_folder(path)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum
