from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.config.sections.models import DataConfig
from verl.data.dataset import load_prompts, truncated
from verl.data.schema import PROMPT_COLUMNS, ragged
from verl.data.tokenizer import encode_chat
from verl.errors import UserError


def config(**settings) -> DataConfig:
    return DataConfig(**{"seed": 1, "max_prompt_length": 100, **settings})


@pytest.fixture
def notices() -> list[str]:
    return []


def test_prompts_have_the_declared_columns_and_their_own_token_ids(tokenizer, write_rows, make_row):
    rows = [make_row("1 + 1?", "2"), make_row("what is 10 - 7?", "3")]
    table = load_prompts(write_rows(rows), tokenizer, config())
    assert {field.name: field.type for field in table.schema} == PROMPT_COLUMNS
    assert table["row"].to_pylist() == [0, 1]
    assert table["data_source"].to_pylist() == ["openai/gsm8k"] * 2
    assert table["ground_truth"].to_pylist() == ["2", "3"]
    assert [json.loads(text) for text in table["prompt"].to_pylist()] == [row["prompt"] for row in rows]
    assert [json.loads(text) for text in table["extra_info"].to_pylist()] == [{"index": 6}, {"index": 15}]
    assert table["images"].to_pylist() == [[], []]
    for row, ids in zip(rows, ragged(table, "prompt_ids"), strict=True):
        assert ids.tolist() == encode_chat(tokenizer, row["prompt"])


def test_several_files_are_joined_in_order_whatever_their_extra_fields(tokenizer, write_rows, make_row):
    first = write_rows([make_row("a")], "a.parquet")
    second = write_rows([make_row("b", extra_info={"tools": ["x"], "index": 7}), make_row("c")], "b.parquet")
    table = load_prompts([first, second], tokenizer, config())
    asked = [json.loads(text)[0]["content"] for text in table["prompt"].to_pylist()]
    assert asked == ["a", "b", "c"]
    assert table["row"].to_pylist() == [0, 1, 2]
    assert json.loads(table["extra_info"][1].as_py()) == {"tools": ["x"], "index": 7}


def test_a_path_may_begin_with_the_home_folder(tokenizer, write_rows, make_row, tmp_path, monkeypatch):
    write_rows([make_row("a")], "home.parquet")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_prompts("~/home.parquet", tokenizer, config()).num_rows == 1


def test_other_column_names_are_read_by_the_keys_that_name_them(tokenizer, write_rows, make_row):
    row = make_row("a", pictures=["a.png", "http://host/b.png"])
    row["chat"], row["source"] = row.pop("prompt"), row.pop("data_source")
    keys = {"prompt_key": "chat", "reward_fn_key": "source", "image_key": "pictures"}
    table = load_prompts(write_rows([row]), tokenizer, config(**keys))
    assert table["data_source"].to_pylist() == ["openai/gsm8k"]
    assert table["images"].to_pylist() == [["a.png", "http://host/b.png"]]


def test_hub_images_are_taken_by_their_path_and_embedded_ones_refused(tokenizer, write_rows, make_row):
    by_path = make_row("a", images=[{"path": "a.png", "bytes": None}])
    assert load_prompts(write_rows([by_path]), tokenizer, config())["images"].to_pylist() == [["a.png"]]
    embedded = make_row("a", images=[{"path": None, "bytes": b"\x89PNG"}])
    with pytest.raises(UserError, match=r"'images'.*row 0.*by reference"):
        load_prompts(write_rows([embedded]), tokenizer, config())


@pytest.mark.parametrize(("given", "kept"), [("12", "12"), (12, "12"), (["a", "b"], '["a", "b"]'), (None, None)])
def test_a_ground_truth_that_is_not_text_becomes_json(tokenizer, write_rows, make_row, given, kept):
    table = load_prompts(write_rows([make_row("a", given)]), tokenizer, config())
    assert table["ground_truth"].to_pylist() == [kept]


def test_extra_info_may_be_missing(tokenizer, write_rows, make_row):
    row = make_row("a")
    del row["extra_info"]
    assert load_prompts(write_rows([row]), tokenizer, config())["extra_info"].to_pylist() == ["{}"]


@pytest.mark.parametrize(
    ("column", "key"), [("prompt", "data.prompt_key"), ("data_source", "data.reward_fn_key"), ("reward_model", "style")]
)
def test_a_missing_column_is_named_with_its_key(tokenizer, write_rows, make_row, column, key):
    row = make_row("a")
    del row[column]
    with pytest.raises(UserError, match=rf"train\.parquet has no column '{column}'.*{key}"):
        load_prompts(write_rows([row]), tokenizer, config())


def test_a_reward_model_column_without_ground_truth_is_named(tokenizer, write_rows, make_row):
    with pytest.raises(UserError, match="no field 'ground_truth'"):
        load_prompts(write_rows([make_row("a", reward_model={"style": "rule"})]), tokenizer, config())


@pytest.mark.parametrize(
    "prompt", ["1 + 1?", [], [{"role": "user"}], [{"role": None, "content": "a"}], [["user", "a"]]], ids=repr
)
def test_a_prompt_that_is_not_a_chat_is_named_with_its_row(tokenizer, write_rows, make_row, prompt):
    with pytest.raises(UserError, match=r"column 'prompt' of .*train\.parquet, row 0.*list of messages"):
        load_prompts(write_rows([make_row("a", prompt=prompt)]), tokenizer, config())


def test_a_missing_file_is_named(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"gone\.parquet does not exist"):
        load_prompts(str(tmp_path / "gone.parquet"), tokenizer, config())


def test_a_file_that_is_not_parquet_is_named(tokenizer, tmp_path):
    path = tmp_path / "text.parquet"
    path.write_text("hello")
    with pytest.raises(UserError, match=r"text\.parquet cannot be read as parquet"):
        load_prompts(str(path), tokenizer, config())


def test_only_the_first_rows_are_used_when_so_asked(tokenizer, write_rows, make_row):
    path = write_rows([make_row(letter) for letter in "abcde"])
    settings = config(train_max_samples=2, val_max_samples=3)
    assert load_prompts(path, tokenizer, settings, kind="train")["row"].to_pylist() == [0, 1]
    assert load_prompts(path, tokenizer, settings, kind="val")["row"].to_pylist() == [0, 1, 2]


def lengths_of(tokenizer, questions: list[str]) -> list[int]:
    return [len(encode_chat(tokenizer, [{"role": "user", "content": question}])) for question in questions]


def test_overlong_prompts_stop_the_run_and_say_how_many_how_long_and_what_would_work(tokenizer, write_rows, make_row):
    questions = ["short", "x" * 60, "ok", "y" * 50]
    path, lengths = write_rows([make_row(question) for question in questions]), lengths_of(tokenizer, questions)
    with pytest.raises(UserError) as failure:
        load_prompts(path, tokenizer, config(max_prompt_length=20))
    message = str(failure.value)
    assert "2 of 4 prompts of data.train_files" in message
    assert f"row 1: {lengths[1]} tokens, row 3: {lengths[3]} tokens" in message
    assert f"data.max_prompt_length={max(lengths)}" in message
    assert load_prompts(path, tokenizer, config(max_prompt_length=max(lengths))).num_rows == 4


def test_overlong_prompts_are_left_out_and_counted_when_filtered(tokenizer, write_rows, make_row, notices):
    path = write_rows([make_row(question) for question in ["short", "x" * 60, "ok"]])
    settings = config(max_prompt_length=20, filter_overlong_prompts=True)
    table = load_prompts(path, tokenizer, settings, notice=notices.append)
    assert [json.loads(text)[0]["content"] for text in table["prompt"].to_pylist()] == ["short", "ok"]
    assert table["row"].to_pylist() == [0, 1]
    assert lengths_of(tokenizer, ["short", "ok"]) == ragged(table, "prompt_ids").lengths.tolist()
    assert notices == ["1 of 3 prompts of data.train_files are over data.max_prompt_length=20 and are left out"]


def test_a_prompt_of_exactly_the_limit_is_kept_whole(tokenizer, write_rows, make_row):
    (length,) = lengths_of(tokenizer, ["exactly"])
    path = write_rows([make_row("exactly")])
    assert load_prompts(path, tokenizer, config(max_prompt_length=length)).num_rows == 1
    with pytest.raises(UserError, match="1 of 1 prompts"):
        load_prompts(path, tokenizer, config(max_prompt_length=length - 1))


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_overlong_prompts_are_cut_on_the_side_asked_for(tokenizer, write_rows, make_row, notices, side):
    long = [{"role": "user", "content": "0123456789"}]
    whole = encode_chat(tokenizer, long)
    path = write_rows([make_row("0123456789"), make_row("a")])
    table = load_prompts(path, tokenizer, config(max_prompt_length=7, truncation=side), notice=notices.append)
    expected = {"left": whole[-7:], "right": whole[:7], "middle": whole[:3] + whole[-4:]}[side]
    assert ragged(table, "prompt_ids")[0].tolist() == expected
    assert ragged(table, "prompt_ids")[1].tolist() == encode_chat(tokenizer, [{"role": "user", "content": "a"}])
    assert len(notices) == 1
    assert "1 of 2 prompts" in notices[0]


@given(st.integers(0, 30), st.integers(1, 20))
def test_cutting_keeps_as_much_as_fits_from_the_ends_asked_for(length, limit):
    ids = np.arange(length)
    kept = min(length, limit)
    assert truncated(ids, limit, "left").tolist() == list(range(length - kept, length))
    assert truncated(ids, limit, "right").tolist() == list(range(kept))
    middle = truncated(ids, limit, "middle").tolist()
    head = middle[: limit // 2]
    assert head == list(range(len(head)))
    assert middle[len(head) :] == list(range(length - (kept - len(head)), length))


def test_a_data_set_that_filtering_leaves_empty_is_an_error_with_the_counts(tokenizer, write_rows, make_row):
    path = write_rows([make_row("x" * 50), make_row("y" * 60)])
    with pytest.raises(UserError, match=r"data\.val_files: no prompt is left of 2 rows.*max_prompt_length=10"):
        load_prompts(path, tokenizer, config(max_prompt_length=10, filter_overlong_prompts=True), kind="val")


def test_a_file_without_rows_is_an_error(tokenizer, write_rows, make_row, tmp_path):
    schema = pq.read_schema(write_rows([make_row("a")]))
    pq.write_table(schema.empty_table(), tmp_path / "empty.parquet")
    with pytest.raises(UserError, match="no prompt is left of 0 rows"):
        load_prompts(str(tmp_path / "empty.parquet"), tokenizer, config())


def test_a_missing_chat_template_is_noticed(tokenizer, write_rows, make_row, notices):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    table = load_prompts(write_rows([make_row("1 + 1?")]), plain, config(), notice=notices.append)
    assert plain.decode(ragged(table, "prompt_ids")[0]) == "<|bos|>1 + 1?\n"
    assert ["no chat template" in notice for notice in notices] == [True]


def test_chat_template_arguments_come_from_the_config(tokenizer, write_rows, make_row):
    table = load_prompts(write_rows([make_row("a")]), tokenizer, config(apply_chat_template_kwargs={"thinking": True}))
    assert tokenizer.decode(ragged(table, "prompt_ids")[0]).endswith("<think>")


def test_more_prompts_than_one_batch_of_the_tokenizer_come_in_order(tokenizer, write_rows, make_row):
    questions = [f"question {number}" for number in range(2500)]
    table = load_prompts(write_rows([make_row(question) for question in questions]), tokenizer, config())
    ids = ragged(table, "prompt_ids")
    assert [len(row) for row in ids] == lengths_of(tokenizer, questions)
    assert tokenizer.decode(ids[2049]) == "<|bos|><|user|>question 2049<|end|><|assistant|>"


def test_pandas_written_files_with_large_strings_are_read(tokenizer, make_row, tmp_path):
    table = pa.Table.from_pylist([make_row("a")])
    path = Path(tmp_path) / "large.parquet"
    pq.write_table(table.set_column(0, "data_source", table["data_source"].cast(pa.large_string())), path)
    assert load_prompts(str(path), tokenizer, config()).num_rows == 1
