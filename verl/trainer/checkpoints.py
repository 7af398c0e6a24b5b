"""The checkpoints of a run: written whole or not at all, checked before use, kept to a number.

``global_step_N/`` appears under its name only when all of it is on disk. ``manifest.json`` in it lists every file with
size and checksum; a folder that does not match its manifest is named and the one before it used.
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
    """The checkpoint could not be written; what was there before is untouched."""


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    step: int

    def damage(self) -> str | None:
        """What is wrong with it, or None: every file is compared with the manifest."""
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
    """keep: how many to keep (None: all)."""

    def __init__(self, folder: Path, keep: int | None = None):
        self.folder, self.keep = Path(folder), keep

    def all(self) -> list[Checkpoint]:
        """Oldest first."""
        found = [(path, re.fullmatch(r"global_step_(\d+)", path.name)) for path in self.folder.glob("global_step_*")]
        return sorted((Checkpoint(path, int(match[1])) for path, match in found if match), key=lambda c: c.step)

    def latest(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """The newest one that is whole; each damaged one that is passed over is named through ``warn``."""
        checkpoints = self.all()
        for checkpoint in reversed(checkpoints):
            damage = checkpoint.damage()
            if damage is None:
                return checkpoint
            warn(f"checkpoint {checkpoint.folder} is damaged: {damage}. Trying the one before it.")
        if checkpoints:
            raise UserError(
                f"every checkpoint in {self.folder} is damaged. "
                "Move them away, or set trainer.resume_mode=disable, to start from the beginning."
            )
        return None

    def at(self, path: Path) -> Checkpoint:
        """The checkpoint in this folder, checked."""
        match = re.fullmatch(r"global_step_(\d+)", path.resolve().name)
        if not match or not path.is_dir():
            raise UserError(f"trainer.resume_from_path={path} is not a checkpoint: name a folder .../global_step_N")
        checkpoint = Checkpoint(path, int(match[1]))
        if damage := checkpoint.damage():
            raise UserError(f"trainer.resume_from_path={path} is damaged: {damage}")
        return checkpoint

    def set_aside(self, after: int) -> Path | None:
        """Move checkpoints later than step ``after`` into a folder of their own, so that none is lost and none is taken
        for one of the run that goes on from there. Gives that folder, None if there was nothing to move."""
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
        """write(folder) puts the models there; ``state`` becomes trainer.json. SaveError if it does not fit.

        state["sound"]: False if the last optimizer step was skipped."""
        final, partial = self.folder / f"global_step_{step}", self.folder / f".partial_global_step_{step}"
        try:
            for left_over in self.folder.glob(".partial_global_step_*"):  # of a run that was killed while saving
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
        safe = f"{kept[-1].folder} is untouched" if kept else "there is no earlier checkpoint"
        return f"could not write {final}: {error.strerror or error} ({free / 1e6:,.0f} MB free there); {safe}"

    def _prune(self) -> None:
        """Deletes all but the newest ``keep``. Only a sound checkpoint takes the place of others, so the last sound one
        is always kept."""
        kept = self.all()
        if self.keep and kept[-1].sound:
            for checkpoint in kept[: -self.keep]:
                shutil.rmtree(checkpoint.folder)


def seal(folder: Path, step: int) -> None:
    """Flush every file to disk and list them in the manifest."""
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
