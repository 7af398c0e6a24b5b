from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from verl.config.sections.models import DataConfig
from verl.data.dataset import load_prompts

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/data_preprocess/gsm8k.py"
TRAIN = [
    {"question": "What is 600 x 2?", "answer": "600 x 2 = <<600*2=1200>>1200\n#### 1,200"},
    {"question": "A debt of 5?", "answer": "It is -5.\n#### -5"},
    {"question": "Half of 5?", "answer": "#### 2.5"},
]
TEST = [{"question": "1 + 1?", "answer": "#### 2"}]


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name, rows in (("train", TRAIN), ("test", TEST)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    return folder


def run(*arguments: object) -> int:
    return runpy.run_path(str(SCRIPT))["main"]([str(argument) for argument in arguments])


def run_command(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_rows_have_the_schema_that_the_scorer_and_the_loader_expect(source, tmp_path, capsys):
    assert run("--local_dir", tmp_path / "out", "--local_dataset_path", source) == 0
    printed = capsys.readouterr().out
    assert "train.parquet: 3 rows" in printed
    assert "test.parquet: 1 rows" in printed
    rows = pq.read_table(tmp_path / "out/train.parquet").to_pylist()
    assert [row["reward_model"] for row in rows] == [
        {"style": "rule", "ground_truth": answer} for answer in ("1200", "-5", "2.5")
    ]
    assert rows[0]["data_source"] == "openai/gsm8k"
    assert rows[0]["ability"] == "math"
    assert rows[0]["extra_info"] == {"split": "train", "index": 0, **TRAIN[0]}
    (message,) = rows[0]["prompt"]
    assert message["role"] == "user"
    assert message["content"].startswith("What is 600 x 2? ")
    assert "#### 42" in message["content"]  # an example of the line that the scorer reads


def test_the_instruction_can_be_chosen(source, tmp_path):
    assert run("--local_dir", tmp_path, "--local_dataset_path", source, "--instruction", "Answer after ####.") == 0
    (message,) = pq.read_table(tmp_path / "test.parquet").to_pylist()[0]["prompt"]
    assert message["content"] == "1 + 1? Answer after ####."


def test_the_written_files_load_as_prompts(source, tmp_path, tokenizer):
    run("--local_dir", tmp_path / "out", "--local_dataset_path", source)
    table = load_prompts(str(tmp_path / "out/train.parquet"), tokenizer, DataConfig(seed=1))
    assert table["ground_truth"].to_pylist() == ["1200", "-5", "2.5"]


def test_bare_paths_are_under_the_home_folder(source, tmp_path):
    done = run_command("--local_dataset_path", source, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "data/gsm8k").iterdir()) == ["test.parquet", "train.parquet"]


def test_without_the_hub_the_error_names_the_way_round(tmp_path):
    done = run_command("--local_dir", tmp_path / "out", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: cannot get openai/gsm8k from the hub")
    assert "--local_dataset_path" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_the_datasets_package_the_error_names_it(tmp_path):
    (tmp_path / "datasets.py").write_text("raise ImportError('not here')")
    done = run_command("--local_dir", tmp_path / "out", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 1
    assert 'pip install -e ".[data]"' in done.stderr
    assert "--local_dataset_path" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{broken", "line 2 is not JSON"),
        ("[1, 2]", "line 2 is not a JSON object"),
        ('{"problem": "1 + 1?", "answer": "#### 2"}', "line 2: no text under question; its keys are problem, answer"),
        ('{"question": "a", "answer": 3}', "line 2: no text under answer"),
        ('{"question": "a", "answer": "it is 3"}', 'line 2: the answer does not end with "#### NUMBER"'),
        ('{"question": "a", "answer": "#### three"}', 'line 2: the answer does not end with "#### NUMBER"'),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(source, tmp_path, capsys, line, complaint):
    with (source / "test.jsonl").open("w") as file:
        file.write(json.dumps(TEST[0]) + "\n" + line + "\n")
    assert run("--local_dir", tmp_path / "out", "--local_dataset_path", source) == 1
    assert f"test.jsonl, {complaint}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_folder_is_named(tmp_path, capsys):
    assert run("--local_dir", tmp_path / "out", "--local_dataset_path", tmp_path / "gone") == 1
    assert "gone/train.jsonl (No such file or directory)" in capsys.readouterr().err


def test_an_empty_file_is_named(source, tmp_path, capsys):
    (source / "train.jsonl").write_text("\n")
    assert run("--local_dir", tmp_path / "out", "--local_dataset_path", source) == 1
    assert "train.jsonl has no rows" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named_and_old_files_stay(source, tmp_path, capsys):
    (tmp_path / "out").write_text("a file, not a folder")
    assert run("--local_dir", tmp_path / "out", "--local_dataset_path", source) == 1
    assert "cannot write" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "a file, not a folder"
