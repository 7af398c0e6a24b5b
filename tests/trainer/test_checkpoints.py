import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from verl.errors import UserError
from verl.trainer.checkpoints import Checkpoints, SaveError


def writer(content: bytes = b"weights"):
    def write(folder: Path) -> None:
        (folder / "actor").mkdir()
        (folder / "actor" / "model.bin").write_bytes(content)

    return write


def test_the_newest_whole_checkpoint_is_found_with_its_state(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, writer(), {"step": 1})
    checkpoints.save(2, writer(), {"step": 2})
    found = checkpoints.latest(warn=pytest.fail)
    assert (found.step, found.state()) == (2, {"step": 2})


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert Checkpoints(tmp_path / "none").latest(warn=pytest.fail) is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, writer(), {"step": step})
    file = tmp_path / "global_step_2" / "actor" / "model.bin"
    if damage == "flip":
        file.write_bytes(b"weighty")
    elif damage == "truncate":
        file.write_bytes(b"wei")
    elif damage == "delete":
        file.unlink()
    else:
        (tmp_path / "global_step_2" / "manifest.json").write_text("{")
    said = []
    assert checkpoints.latest(said.append).step == 1
    assert len(said) == 1
    assert "global_step_2" in said[0]


def test_only_damaged_checkpoints_stop_the_run_instead_of_starting_over(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, writer(), {})
    (tmp_path / "global_step_1" / "actor" / "model.bin").unlink()
    with pytest.raises(UserError, match=r"^all checkpoints in .* are damaged"):
        checkpoints.latest(lambda text: None)


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 12):
        checkpoints.save(step, writer(), {})
    assert [c.step for c in checkpoints.all()] == [10, 11]


def test_a_writer_that_fails_leaves_the_earlier_checkpoint_and_no_debris(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, writer(), {})

    def broken(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        checkpoints.save(2, broken, {})
    assert os.listdir(tmp_path) == ["global_step_1"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_loses_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine does not let the test mount a file system")
    try:
        checkpoints = Checkpoints(disk)
        checkpoints.save(1, writer(b"x" * 300_000), {"step": 1})
        with pytest.raises(SaveError, match=r"(?s)global_step_2.*No space left.*global_step_1 is unchanged"):
            checkpoints.save(2, writer(b"x" * 900_000), {"step": 2})
        assert checkpoints.latest(warn=pytest.fail).step == 1
        assert os.listdir(disk) == ["global_step_1"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_kill_while_saving_leaves_no_checkpoint_by_that_name(tmp_path):
    script = f"""
import os, signal
from pathlib import Path
from verl.trainer.checkpoints import Checkpoints
def write(folder):
    (folder / "half").write_bytes(b"x" * 1000)
    os.kill(os.getpid(), signal.SIGKILL)
Checkpoints(Path({str(tmp_path)!r})).save(2, write, {{}})
"""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, writer(), {})
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert [c.step for c in checkpoints.all()] == [1]
    checkpoints.save(2, writer(), {})
    assert sorted(os.listdir(tmp_path)) == ["global_step_1", "global_step_2"]


def test_a_path_to_resume_from_is_checked(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoint = checkpoints.save(3, writer(), {"step": 3})
    assert checkpoints.at(checkpoint.folder).step == 3
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoints.at(tmp_path / "elsewhere")
    manifest = json.loads((checkpoint.folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"actor/model.bin", "trainer.json"}


def test_checkpoints_of_another_course_of_the_run_are_set_aside_not_lost(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, writer(), {"step": step})
    aside = checkpoints.set_aside(after=1)
    assert [c.step for c in checkpoints.all()] == [1]
    assert sorted(os.listdir(aside)) == ["global_step_2", "global_step_3"]
    assert checkpoints.set_aside(after=1) is None
