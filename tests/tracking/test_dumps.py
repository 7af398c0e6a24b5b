"""Generations on disk."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl.data.schema import COLUMNS
from verl.tracking.dumps import dump_rows, generation_rows, read_rows, sample_text


@pytest.fixture
def trajectories():
    columns = {
        "prompt_ids": [[1, 2], [3]],
        "response_ids": [[7, 8, 9], []],
        "ground_truth": ["72", "10"],
        "score": [1.0, 0.0],
        "uid": ["5-0-0", "5-1-0"],
        "data_source": ["openai/gsm8k"] * 2,
        "finish_reason": ["stop", "abort"],
        "reward_extra": [json.dumps({"pred": "72", "acc": True, "score": 9}), ""],
    }
    return pa.table({name: pa.array(values, COLUMNS[name]) for name, values in columns.items()})


def decode(rows):
    return [" ".join(f"<{token}>" for token in row) for row in rows]


def test_a_trajectory_becomes_a_row_of_its_texts_score_and_extras(trajectories):
    first, second = generation_rows(trajectories, decode, step=5)
    assert first == {
        "input": "<1> <2>",
        "output": "<7> <8> <9>",
        "gts": "72",
        "score": 1.0,
        "step": 5,
        "response_tokens": 3,
        "data_source": "openai/gsm8k",
        "uid": "5-0-0",
        "finish_reason": "stop",
        "pred": "72",
        "acc": True,
    }
    assert (second["output"], second["response_tokens"], second["score"]) == ("", 0, 0.0)


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_rows_come_back_as_they_were_dumped(tmp_path, trajectories, file_format):
    rows = [
        {"input": "多少?\n\u2028", "output": 'a "quote"\r\n', "gts": "1", "score": 0.1 + 0.2, "step": 3},
        {"input": "", "output": "🙂", "gts": None, "score": -1.0, "step": 3},
    ]
    path = dump_rows(tmp_path / "validation", 3, rows, file_format)
    assert path == tmp_path / "validation" / f"3.{file_format}"
    assert read_rows(path) == rows
    table_path = dump_rows(tmp_path / "rollouts", 4, trajectories, file_format)
    assert read_rows(table_path) == trajectories.to_pylist()


def test_a_field_that_only_later_rows_have_is_kept_in_parquet_too(tmp_path):
    rows = [{"output": "a"}, {"output": "b", "pred": "7"}]
    assert read_rows(dump_rows(tmp_path, 1, rows, "parquet")) == [{"output": "a", "pred": None}, rows[1]]


def test_a_parquet_dump_of_a_table_keeps_its_types(tmp_path, trajectories):
    assert pq.read_table(dump_rows(tmp_path, 4, trajectories, "parquet")).schema.equals(trajectories.schema)


def test_text_that_is_not_valid_unicode_is_kept(tmp_path):
    rows = [{"output": "half an emoji \ud83d"}]
    assert read_rows(dump_rows(tmp_path, 1, rows)) == rows


def test_a_dump_replaces_an_earlier_one_whole_or_not_at_all(tmp_path):
    path = dump_rows(tmp_path, 7, [{"output": "old"}])
    with pytest.raises(TypeError):
        dump_rows(tmp_path, 7, [{"output": "new"}, {"output": object()}])
    assert read_rows(path) == [{"output": "old"}]
    dump_rows(tmp_path, 7, [{"output": "new"}])
    assert read_rows(path) == [{"output": "new"}]
    assert list(tmp_path.iterdir()) == [path]


def test_a_sample_for_the_eye_is_cut_to_the_end_of_the_prompt_and_the_beginning_of_the_answer():
    row = {"input": "a" * 1000 + " how many?", "output": "so 2\n#### 2" + "b" * 1000, "gts": "2", "score": 1.0}
    lines = sample_text(row, 10).splitlines()
    assert lines[0] == "validation sample, step 10, score 1, reference 2"
    assert lines[1].startswith("    ...a")
    assert lines[1].endswith("how many?")
    assert lines[2] == "  > so 2"
    assert lines[3].startswith("  > #### 2")
    assert lines[3].endswith("...")
    assert sum(map(len, lines)) < 1000
