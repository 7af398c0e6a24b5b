"""Responses to a file of prompts, through the command line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import ROOT, make_prompts

from verl.trainer.main_generation import main


def arguments(small: Path, output: Path, **keys: object) -> list[str]:
    """The command line of a small run, keys replaced or added to (dots written as __)."""
    chosen = {
        "data.path": small / "train.parquet",
        "data.output_path": output,
        "data.batch_size": 10,
        "data.max_prompt_length": 8,
        "data.max_response_length": 12,
        "model.path": small / "model",
        "rollout.name": "hf",
        **{name.replace("__", "."): value for name, value in keys.items()},
    }
    return [f"{name}={value}" for name, value in chosen.items()]


def test_greedy_responses_are_those_of_transformers(small, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main(arguments(small, tmp_path / "out.parquet", rollout__temperature=0)) == 0
    model = AutoModelForCausalLM.from_pretrained(small / "model")
    tokenizer = AutoTokenizer.from_pretrained(small / "model")
    for row in pq.read_table(tmp_path / "out.parquet").to_pylist():
        prompt = tokenizer(row["prompt"][0]["content"], return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert row["responses"] == [tokenizer.decode(ids, skip_special_tokens=True)]
        assert row["response_tokens"] == [len(ids)]
        assert row["finish_reasons"] == ["stop" if ids[-1] == tokenizer.eos_token_id else "length"]


def test_the_prompts_rows_come_back_in_order_with_n_responses_each(small, tmp_path):
    assert main(arguments(small, tmp_path / "out.parquet", rollout__n=3)) == 0
    prompts, found = pq.read_table(small / "train.parquet"), pq.read_table(tmp_path / "out.parquet")
    assert found.select(prompts.column_names).equals(prompts)
    assert [len(row) for row in found["responses"].to_pylist()] == [3] * prompts.num_rows
    assert len({text for row in found["responses"].to_pylist() for text in row}) > prompts.num_rows
    assert list(tmp_path.iterdir()) == [tmp_path / "out.parquet"]


def test_a_jsonl_file_holds_the_same_rows_as_a_parquet_file(small, tmp_path):
    for name in ("out.parquet", "out.jsonl"):
        assert main(arguments(small, tmp_path / name)) == 0
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == pq.read_table(tmp_path / "out.parquet").to_pylist()


def test_the_batch_size_changes_no_response(small, tmp_path):
    for size in (24, 5):
        assert main(arguments(small, tmp_path / f"{size}.parquet", rollout__n=2, data__batch_size=size)) == 0
    assert pq.read_table(tmp_path / "24.parquet").equals(pq.read_table(tmp_path / "5.parquet"))


def test_ranks_of_their_own_give_the_same_responses(small, tmp_path):
    assert main(arguments(small, tmp_path / "one.parquet", rollout__n=2)) == 0
    ranks = {"trainer__n_gpus_per_node": 2, "trainer__device": "cpu"}
    command = [sys.executable, "-m", "verl.trainer.main_generation"]
    command += arguments(small, tmp_path / "two.parquet", rollout__n=2, **ranks)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert pq.read_table(tmp_path / "one.parquet").equals(pq.read_table(tmp_path / "two.parquet"))


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_finished_batches_outlive_a_run_and_the_same_command_goes_on(small, tmp_path, end):
    make_prompts(tmp_path / "many.parquet", 200, seed=3)
    keys = {"data__path": tmp_path / "many.parquet", "data__batch_size": 1, "rollout__n": 2}
    assert main(arguments(small, tmp_path / "whole.parquet", **keys)) == 0
    output, parts = tmp_path / "out.parquet", tmp_path / "out.parquet.parts"
    command = [sys.executable, "-m", "verl.trainer.main_generation", *arguments(small, output, **keys)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process:
        deadline = time.monotonic() + 120
        while not (parts / "3.parquet").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(end)
        said = process.communicate(timeout=60)[0]
    assert not output.exists(), "the run was over before the signal came"
    kept = {part.name: part.stat().st_mtime_ns for part in parts.glob("[0-9]*.parquet")}
    assert len(kept) >= 4
    if end == signal.SIGINT:
        assert process.returncode == 130
        assert f"{len(kept)} of 200 batches are in {parts}. The same command resumes from there" in said
    assert subprocess.run(command, capture_output=True, cwd=ROOT).returncode == 0
    assert pq.read_table(output).equals(pq.read_table(tmp_path / "whole.parquet"))
    assert not parts.exists()


def test_parts_of_a_run_with_other_settings_are_not_mixed_in(small, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("verl.trainer.generation.output.Output.finish", lambda self: None)
        assert main(arguments(small, tmp_path / "out.parquet")) == 0
    assert main(arguments(small, tmp_path / "out.parquet", rollout__temperature=0.5)) == 1
    said = capsys.readouterr().err
    assert "rollout.temperature=1.0 there, 0.5 now" in said
    assert "remove the folder" in said
    assert main(arguments(small, tmp_path / "out.parquet", rollout__max_num_seqs=3)) == 0  # decides no response


def test_prompts_that_are_left_out_are_counted_and_the_others_keep_their_responses(small, tmp_path, capsys):
    make_prompts(tmp_path / "long.parquet", 24, seed=0, length=12)
    keys = {"data__path": tmp_path / "long.parquet", "data__filter_overlong_prompts": True}
    assert (
        main(arguments(small, tmp_path / "all.parquet", data__path=keys["data__path"], data__max_prompt_length=12)) == 0
    )
    assert main(arguments(small, tmp_path / "short.parquet", **keys)) == 0
    everything = pq.read_table(tmp_path / "all.parquet").to_pylist()
    short = [row for row in everything if len(row["prompt"][0]["content"]) <= 8]
    assert f"{24 - len(short)} of 24 prompts of data.path are over data.max_prompt_length=8" in capsys.readouterr().out
    assert pq.read_table(tmp_path / "short.parquet").to_pylist() == short


def test_all_problems_come_in_one_report_by_the_names_that_were_typed(small, tmp_path, capsys):
    (tmp_path / "there.parquet").touch()
    keys = {
        "data__path": tmp_path / "none.parquet",
        "model__path": tmp_path / "nowhere",
        "rollout__name": "vlm",
        "rollout__n": 2,
        "rollout__temperature": 0,
        "rollout__max_model_len": 5,
        "rollout__temprature": 1,
    }
    assert main(arguments(small, tmp_path / "there.parquet", **keys)) == 2
    said = capsys.readouterr().err
    for part in (
        "data.path",
        "model.path",
        "rollout.name=vlm",
        "rollout.n=2",
        "rollout.max_model_len",
        "data.output_path",
    ):
        assert part in said
    assert "the nearest" in said
    assert "actor_rollout_ref" not in said


@pytest.mark.parametrize("name", ["out.csv", "out"])
def test_a_file_whose_name_says_no_format_is_refused(small, tmp_path, capsys, name):
    assert main(arguments(small, tmp_path / name)) == 2
    assert "end it in .parquet or .jsonl" in capsys.readouterr().err


def test_prompts_that_hold_responses_already_are_refused(small, tmp_path, capsys):
    table = pq.read_table(small / "train.parquet")
    pq.write_table(table.append_column("responses", pa.array(["x"] * table.num_rows)), tmp_path / "in.parquet")
    assert main(arguments(small, tmp_path / "out.parquet", data__path=tmp_path / "in.parquet")) == 1
    assert "has a column 'responses', which this run writes: rename it" in capsys.readouterr().err


def test_prompts_with_images_are_refused_before_anything_starts(small, tmp_path, capsys):
    table = pq.read_table(small / "train.parquet")
    images = pa.array([[]] * 4 + [["a.png"]] * 20, pa.list_(pa.string()))
    pq.write_table(table.append_column("images", images), tmp_path / "in.parquet")
    keys = {"data__path": tmp_path / "in.parquet", "trainer__dry_run": True}
    assert main(arguments(small, tmp_path / "out.parquet", **keys)) == 1
    said = capsys.readouterr().out
    assert "its row 4 has images (column 'images'): hf does not take them" in said
    for fine in ({"data__image_key": "null"}, {"data__max_samples": 4}):
        assert main(arguments(small, tmp_path / "out.parquet", **keys, **fine)) == 0


def test_a_dry_run_prints_what_would_be_done_and_names_keys_without_effect(small, tmp_path, capsys):
    keys = {"rollout__enforce_eager": True, "model__use_remove_padding": True, "trainer__dry_run": True}
    assert main(arguments(small, tmp_path / "out.parquet", **keys)) == 0
    said = capsys.readouterr().out
    for part in ("24, 1 responses each", "3 of 10 prompts", "hf, 1 on cpu", "No problem found"):
        assert part in said
    assert "rollout.enforce_eager=True has no effect" in said
    assert "model.use_remove_padding=True has no effect: nothing is trained." in said
    assert list(tmp_path.iterdir()) == []
