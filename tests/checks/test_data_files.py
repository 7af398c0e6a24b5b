"""Parquet files that are missing, are not what they should be, or lack columns."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl.checks.files import check_output_folder, check_parquet
from verl.checks.images import check_image_key, check_images
from verl.config.sections.models import DataConfig
from verl.findings import Findings

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
    assert f"the path exists up to {tmp_path}" in only_problem(str(tmp_path / "not" / "here" / "train.parquet")).fix


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


LISTS = pa.list_(pa.string())
STRUCTS = pa.list_(pa.struct([("path", pa.string()), ("bytes", pa.binary())]))


def with_images(tmp_path, images, kind=LISTS, limit=-1, column="images"):
    """What is said of one file for each of these lists of rows' images."""
    findings, files = Findings(), []
    for number, rows in enumerate(images):
        files.append(str(tmp_path / f"{number}.parquet"))
        pq.write_table(pa.table({"images": pa.array(rows, kind)}), files[-1])
    check_images(findings, "data.train_files", files, DataConfig(image_key=column), limit, "sglang")
    return findings.problems


@pytest.mark.parametrize(
    ("rows", "kind"), [([[], None, []], LISTS), ([None, None], pa.null()), ([[], []], STRUCTS), ([], LISTS)]
)
def test_rows_whose_images_are_empty_or_null_are_no_problem(tmp_path, rows, kind):
    assert with_images(tmp_path, [rows], kind) == []


@pytest.mark.parametrize(
    ("image", "kind"),
    [(["a.png"], LISTS), ([{"path": None, "bytes": b"x"}], STRUCTS), ("a.png", pa.string())],
)
def test_the_first_row_with_images_is_named(tmp_path, image, kind):
    rows = [None] * 700 + [image, image]
    (problem,) = with_images(tmp_path, [rows], kind)
    assert problem.value == str(tmp_path / "0.parquet")
    assert "its row 700 has images (column 'images')" in problem.why
    assert "sglang" in problem.why


def test_of_each_file_with_images_the_first_row_is_named(tmp_path):
    problems = with_images(tmp_path, [[["a"]], [[]], [[], ["b"]]])
    assert [(Path(problem.value).name, problem.why[:9]) for problem in problems] == [
        ("0.parquet", "its row 0"),
        ("2.parquet", "its row 1"),
    ]


@pytest.mark.parametrize(("limit", "found"), [(0, 0), (3, 0), (4, 1), (-1, 1)])
def test_images_of_rows_that_the_run_leaves_out_are_no_problem(tmp_path, limit, found):
    assert len(with_images(tmp_path, [[[], []], [[], ["a"]]], limit=limit)) == found


def test_images_are_not_looked_for_where_no_column_is_named_or_there_is_none(tmp_path):
    assert with_images(tmp_path, [[["a"]]], column=None) == []
    assert with_images(tmp_path, [[["a"]]], column="pictures") == []


@pytest.mark.parametrize(
    ("column", "set_keys", "said"),
    [
        ("picture", {"data.image_key"}, True),
        ("images", {"data.image_key"}, False),
        ("picture", set(), False),
        (None, {"data.image_key"}, False),
    ],
)
def test_a_column_of_images_that_the_user_named_and_no_file_has_is_told_with_those_there_are(
    tmp_path, column, set_keys, said
):
    files = [str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")]
    pq.write_table(pa.table({"prompt": ["x"]}), files[0])
    pq.write_table(pa.table({"prompt": ["x"], "images": [["a"]]}), files[1])
    findings = Findings()
    check_image_key(findings, column, files, frozenset(set_keys))
    expected = "data.image_key has no effect: no data file has a column 'picture'; they have images, prompt."
    assert findings.warnings == ([expected] if said else [])


def test_messages_in_parts_are_no_text(tmp_path):
    parts = [{"type": "image", "image": "a.png", "text": None}, {"type": "text", "image": None, "text": "What is it?"}]
    chats = [[{"role": "user", "content": parts}]]
    pq.write_table(pa.table({"prompt": chats}), tmp_path / "x.parquet")
    findings = Findings()
    check_images(findings, "data.val_files", str(tmp_path / "x.parquet"), DataConfig(), -1, "hf")
    (problem,) = findings.problems
    assert problem.key == "data.val_files"
    assert "the messages in its column 'prompt' are not text: their content is list<" in problem.why
