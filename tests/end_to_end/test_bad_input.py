"""What a user gets wrong, typed as they would type it: a message that says what to do, no traceback, nothing begun."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import ROOT, arguments, command, make_prompts, metrics_of

from verl.trainer.checkpoints import Checkpoints
from verl.trainer.main_ppo import main


def refused(capsys, arguments, *words, codes=(1, 2)):
    """The run is refused, and what the user reads holds all of these words."""
    code = main(arguments)
    said = "".join(capsys.readouterr())
    assert code in codes, said
    assert "Traceback" not in said
    for word in words:
        assert word in said, f"{word!r} is not in:\n{said}"
    return said


def test_a_misspelt_key_names_the_nearest_one(small, tmp_path, capsys):
    refused(capsys, arguments(small, tmp_path, "actor_rollout_ref.actor.ppo_mini_batchsize=4"), "ppo_mini_batch_size")


def test_a_missing_data_file(small, tmp_path, capsys):
    missing = small / "trian.parquet"
    refused(capsys, arguments(small, tmp_path, data__train_files=missing), "data.train_files", str(missing))


def test_a_parquet_without_prompts(small, tmp_path, capsys):
    table = pq.read_table(small / "train.parquet")
    renamed = [name.replace("prompt", "question") for name in table.column_names]
    pq.write_table(table.rename_columns(renamed), tmp_path / "noprompt.parquet")
    keys = {"data__train_files": tmp_path / "noprompt.parquet"}
    refused(capsys, arguments(small, tmp_path, **keys), "prompt", "data.prompt_key", "question")


@pytest.fixture
def long_prompts(tmp_path):
    make_prompts(tmp_path / "long.parquet", 24, seed=0, length=12)
    return tmp_path / "long.parquet"


def test_prompts_over_the_limit_are_an_error_by_default(small, tmp_path, capsys, long_prompts):
    keys = {"data__train_files": long_prompts}
    refused(capsys, arguments(small, tmp_path, **keys), "data.max_prompt_length", "data.filter_overlong_prompts")


@pytest.mark.parametrize("mode", ["left", "right", "middle"])
def test_prompts_over_the_limit_are_cut_when_asked(small, tmp_path, long_prompts, mode):
    keys = {"data__train_files": long_prompts, "data__truncation": mode, "trainer__total_training_steps": 1}
    assert main(arguments(small, tmp_path, **keys)) == 0
    assert metrics_of(tmp_path)[-1]["prompt_length/max"] == 8


def test_no_data_left_after_filtering(small, tmp_path, capsys, long_prompts):
    keys = {"data__train_files": long_prompts, "data__max_prompt_length": 1, "data__filter_overlong_prompts": True}
    refused(capsys, arguments(small, tmp_path, **keys), "data.train_files", "no prompt is left")


def test_less_data_left_than_a_batch(small, tmp_path, capsys, long_prompts):
    keys = {"data__train_files": long_prompts, "data__max_prompt_length": 4, "data__filter_overlong_prompts": True}
    refused(capsys, arguments(small, tmp_path, **keys), "data.train_batch_size")


def test_an_empty_data_set(small, tmp_path, capsys):
    pq.write_table(pq.read_table(small / "train.parquet").slice(0, 0), tmp_path / "empty.parquet")
    refused(capsys, arguments(small, tmp_path, data__train_files=tmp_path / "empty.parquet"), "data.train_files")


def test_an_unknown_engine(small, tmp_path, capsys):
    refused(capsys, arguments(small, tmp_path, actor_rollout_ref__rollout__name="vlm"), "rollout.name", "vllm", "hf")


def test_a_model_path_that_does_not_exist(small, tmp_path, capsys):
    keys = {"actor_rollout_ref__model__path": small / "modle"}
    refused(capsys, arguments(small, tmp_path, **keys), "actor_rollout_ref.model.path", str(small / "modle"))


def test_a_model_that_is_on_no_hub_and_in_no_cache(small, tmp_path, capsys):
    keys = {"actor_rollout_ref__model__path": "nobody/no-such-model", "actor_rollout_ref__rollout__name": "hf"}
    refused(capsys, arguments(small, tmp_path, **keys), "nobody/no-such-model")


def test_a_model_with_damaged_weights(small, tmp_path, capsys):
    import shutil

    shutil.copytree(small / "model", tmp_path / "model")
    with (tmp_path / "model" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    keys = {"actor_rollout_ref__model__path": tmp_path / "model"}
    refused(capsys, arguments(small, tmp_path, **keys), str(tmp_path / "model"))


def test_a_reward_function_that_always_fails(small, tmp_path, capsys):
    (tmp_path / "bad.py").write_text("def compute_score(**kwargs):\n    return 1 / 0\n")
    keys = {"custom_reward_function__path": tmp_path / "bad.py"}
    refused(capsys, arguments(small, tmp_path, **keys), "ZeroDivisionError", "reward.max_error_share")


def test_all_problems_come_in_one_report(small, tmp_path, capsys):
    keys = {
        "data__train_files": tmp_path / "none.parquet",
        "actor_rollout_ref__model__path": tmp_path / "none",
        "actor_rollout_ref__actor__ppo_mini_batch_size": 16,
        "actor_rollout_ref__rollout__temprature": 1,
    }
    said = refused(capsys, arguments(small, tmp_path, **keys), codes=(2,))
    for word in ("none.parquet", "model.path", "ppo_mini_batch_size", "rollout.temperature"):
        assert word in said


def test_a_data_source_without_a_scorer(small, tmp_path, capsys):
    table = pq.read_table(small / "train.parquet")
    names = pa.array(["nobody/knows"] * table.num_rows)
    table = table.set_column(table.column_names.index("data_source"), "data_source", names)
    pq.write_table(table, tmp_path / "unknown.parquet")
    keys = {"data__train_files": tmp_path / "unknown.parquet", "custom_reward_function__path": "null"}
    refused(capsys, arguments(small, tmp_path, **keys), "nobody/knows", "custom_reward_function.path")


@pytest.fixture
def pictures(small, tmp_path):
    """Makes of the small job's file of this name one in which these rows have an image."""

    def make(name, *rows):
        table = pq.read_table(small / f"{name}.parquet")
        images = [["a.png"] if row in rows else [] for row in range(table.num_rows)]
        path = tmp_path / f"pictures_{name}.parquet"
        pq.write_table(table.append_column("images", pa.array(images, pa.list_(pa.string()))), path)
        return path

    return make


@pytest.mark.parametrize("name", ["train", "val"])
@pytest.mark.parametrize("engine", ["hf", "sglang", "vllm"])
def test_images_which_no_engine_takes(small, tmp_path, capsys, pictures, name, engine):
    path = pictures(name, 3, 5)
    keys = {f"data__{name}_files": path, "actor_rollout_ref__rollout__name": engine, "trainer__dry_run": True}
    words = (f"data.{name}_files={path}", f"{engine} does not take them")
    said = refused(capsys, arguments(small, tmp_path / "run", **keys), *words)
    assert "its row 3 has images (column 'images')" in said
    assert "data.image_key=null" in said


def test_images_are_refused_before_anything_starts(small, tmp_path, pictures):
    """Not even torch is imported."""
    code = (
        "import sys; from verl.trainer.main_ppo import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'ray', 'transformers'} & sys.modules.keys(); sys.exit(code)"
    )
    line = arguments(small, tmp_path / "run", data__train_files=pictures("train", 0))
    done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert "nothing was started" in done.stderr
    assert "its row 0 has images" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_column_of_images_with_none_in_it_is_no_problem(small, tmp_path, pictures):
    keys = {"data__train_files": pictures("train"), "data__val_files": pictures("val")}
    assert main(arguments(small, tmp_path / "run", **keys, trainer__total_training_steps=1)) == 0


def test_the_text_of_prompts_with_images_is_trained_on_when_asked(small, tmp_path, pictures):
    keys = {"data__train_files": pictures("train", *range(24)), "data__image_key": "null"}
    assert main(arguments(small, tmp_path / "run", **keys, trainer__total_training_steps=1)) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_while_saving_loses_nothing(small, tmp_path):
    """The disk fills up between two checkpoints; then there is room again, and the run ends whole."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine does not let the test mount a file system")
    try:
        keys = {"trainer__total_training_steps": 40, "trainer__save_freq": 1, "trainer__val_before_train": False}
        keys["actor_rollout_ref__actor__checkpoint__save_contents"] = "[model,optimizer,extra,hf_model]"
        log = (tmp_path / "log").open("w+")
        job = subprocess.Popen(command(arguments(small, disk, **keys)), stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while "could not write" not in (tmp_path / "log").read_text():
            if (disk / "global_step_2").exists() and not (disk / "ballast").exists():
                fill(disk / "ballast")
            assert job.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        kept = Checkpoints(disk).latest(warn=pytest.fail)
        assert kept is not None
        (disk / "ballast").unlink()
        assert job.wait(timeout=120) == 0, (tmp_path / "log").read_text()
        said = (tmp_path / "log").read_text()
        assert "Traceback" not in said
        assert "is unchanged" in said
        assert Checkpoints(disk).latest(warn=pytest.fail).step == 40
        assert [step["step"] for step in metrics_of(disk) if "actor/lr" in step] == list(range(1, 41))
    finally:
        if job.poll() is None:
            job.send_signal(signal.SIGKILL)
            job.wait()
        subprocess.run(["umount", disk], check=True)


def fill(path):
    """Take what is left of the disk, but for a little that the log files may have."""
    free = os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize
    with suppress(OSError):  # the run was quicker: so much the fuller
        path.write_bytes(bytes(max(free - 300_000, 0)))


def test_a_disk_that_stays_full_ends_with_an_error_that_says_so(small, tmp_path, monkeypatch, capsys):
    from verl.trainer.ppo.worker import PPOWorker

    def full(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PPOWorker, "save", full)
    refused(capsys, arguments(small, tmp_path, trainer__save_freq=1), "could not write", "No space left", codes=(1,))
