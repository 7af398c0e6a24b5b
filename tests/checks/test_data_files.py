"""Parquet files that are missing, are not what they should be, or lack columns."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl.checks.files import check_output_folder, check_parquet
from verl.checks.findings import Findings

COLUMNS = {"prompt": "name it in data.prompt_key", "reward_model.ground_truth": "add it"}


def check(files) -> tuple[int | None, Findings]:
    findings = Findings()
    return check_parquet(findings, "data.train_files", files, COLUMNS), findings


def only_problem(files):
    _, findings = check(files)
    (problem,) = findings.problems
    assert problem.key == "data.train_files"
    return problem


def test_rows_of_all_files_are_counted_from_their_footers(gsm8k):
    rows, findings = check([str(gsm8k / "train.parquet"), str(gsm8k / "test.parquet")])
    assert rows == 7473 + 1319
    assert not findings.problems


def test_every_missing_file_is_named(gsm8k, tmp_path):
    rows, findings = check([str(tmp_path / "a.parquet"), str(gsm8k / "train.parquet"), str(tmp_path / "b.parquet")])
    assert rows is None
    assert [problem.value for problem in findings.problems] == [
        str(tmp_path / name) for name in ("a.parquet", "b.parquet")
    ]


def test_a_misspelt_file_name_gets_the_nearest_one(gsm8k):
    assert str(gsm8k / "train.parquet") in only_problem(str(gsm8k / "trian.parquet")).fix


def test_of_a_missing_folder_the_part_that_exists_is_named(tmp_path):
    assert f"good up to {tmp_path}" in only_problem(str(tmp_path / "not" / "here" / "train.parquet")).fix


def test_a_folder_is_answered_with_the_files_in_it(gsm8k):
    problem = only_problem(str(gsm8k))
    assert "folder" in problem.why
    assert "train.parquet" in problem.fix


def test_a_file_that_is_not_parquet_says_so(tmp_path):
    file = tmp_path / "train.parquet"
    file.write_text('{"prompt": "hello"}\n')
    assert "cannot be read as parquet" in only_problem(str(file)).why


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path):
    pq.write_table(pa.table({"question": ["1 + 1?"], "reward_model": [{"style": "rule"}]}), tmp_path / "x.parquet")
    rows, findings = check(str(tmp_path / "x.parquet"))
    assert rows == 1
    assert ["'prompt'" in findings.problems[0].why, "'reward_model.ground_truth'" in findings.problems[1].why] == [
        True,
        True,
    ]
    assert "question, reward_model.style" in findings.problems[0].why
    assert [problem.fix for problem in findings.problems] == list(COLUMNS.values())


def test_a_data_set_without_rows_is_a_problem(tmp_path):
    table = pa.table(
        {"prompt": pa.array([], pa.string()), "reward_model": pa.array([], pa.struct([("ground_truth", pa.string())]))}
    )
    pq.write_table(table, tmp_path / "empty.parquet")
    assert "no rows" in only_problem([str(tmp_path / "empty.parquet")]).why


def test_a_tilde_is_the_home_folder(gsm8k, monkeypatch):
    monkeypatch.setenv("HOME", str(gsm8k))
    assert check("~/test.parquet")[0] == 1319


@pytest.mark.parametrize(
    ("folder", "needed", "why"),
    [
        ("new/run", None, None),
        ("new/run", 10**18, "the disk has"),
        ("a_file", None, "a file, not a folder"),
        ("a_file/run", None, "not a folder"),
    ],
)
def test_the_output_folder_can_be_made_and_has_room(tmp_path, folder, needed, why):
    (tmp_path / "a_file").write_text("")
    findings = Findings()
    check_output_folder(findings, "trainer.default_local_dir", str(tmp_path / folder), needed)
    assert [why in problem.why for problem in findings.problems] == ([True] if why else [])


def test_a_folder_that_cannot_be_written_to_is_a_problem():
    if not Path("/proc").is_dir():
        pytest.skip("needs /proc, which nobody can write to")
    findings = Findings()
    check_output_folder(findings, "trainer.default_local_dir", "/proc/run")
    assert "cannot be written to" in findings.problems[0].why
