"""Model paths: local folders that lack something, and hub ids, of which only the local cache is looked at."""

from __future__ import annotations

import json
import os
import struct

import pytest

from verl.checks.models import check_architecture, check_model, check_tokenizer, looks_local, parameter_counts
from verl.findings import Findings

KEY = "actor_rollout_ref.model.path"


def problem_of(path):
    findings = Findings()
    check_model(findings, KEY, str(path))
    (problem,) = findings.problems
    assert (problem.key, problem.value) == (KEY, str(path))
    return problem


def test_a_whole_folder_gives_its_facts(tmp_path, make_model):
    findings = Findings()
    facts = check_model(findings, KEY, str(make_model(tmp_path / "m", max_positions=77, parameters=12345)))
    assert findings == Findings()
    assert (facts.max_positions, facts.parameters) == (77, 12345)


def test_a_misspelt_folder_gets_the_nearest_one(tmp_path, make_model):
    make_model(tmp_path / "smollm2")
    assert str(tmp_path / "smollm2") in problem_of(tmp_path / "smollm").fix
    assert str(tmp_path / "smollm2") in problem_of(tmp_path / "smollm" / "final").fix


def test_a_folder_without_config_points_to_the_models_below_it(tmp_path, make_model):
    make_model(tmp_path / "run" / "global_step_4" / "hf")
    problem = problem_of(tmp_path / "run")
    assert "no config.json" in problem.why
    assert "global_step_4/hf" in problem.fix


def test_a_folder_without_weights_says_so(tmp_path, make_model):
    folder = make_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    assert "no weights" in problem_of(folder).why


def test_missing_weight_files_of_an_index_are_named(tmp_path, make_model):
    folder = make_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "1 of its weight files are missing: model-00002-of-00002.safetensors" in problem_of(folder).why


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n"


def test_a_weight_file_that_is_cut_off_or_too_long_says_so(tmp_path, make_model):
    file = make_model(tmp_path / "m", parameters=5000) / "model.safetensors"
    whole = file.stat().st_size
    for size in (whole - 1, whole + 1, whole // 2):
        os.truncate(file, size)
        assert problem_of(tmp_path / "m").why == f"model.safetensors has {size:,} bytes, and by its header {whole:,}"
    for size in (0, 5, 20):
        os.truncate(file, size)
        assert "model.safetensors is no safetensors file, or only the beginning" in problem_of(tmp_path / "m").why


@pytest.mark.parametrize("header", [b"[]", b'{"a": 1}', b'{"a": {"data_offsets": []}}', b'{"a"', b"\xff"])
def test_what_is_no_header_of_weights_says_so(tmp_path, make_model, header):
    file = make_model(tmp_path / "m") / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    assert "is no safetensors file" in problem_of(tmp_path / "m").why


def test_pointers_of_git_lfs_are_told_from_files(tmp_path, make_model):
    folder = make_model(tmp_path / "m")
    names = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    (folder / "model.safetensors").rename(folder / names[0])
    (folder / names[1]).write_text(POINTER)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(enumerate(names))}))
    problem = problem_of(folder)
    assert problem.why == f"only the Git LFS pointer is there of {names[1]}"
    assert "git lfs pull" in problem.fix
    (folder / "tokenizer.json").write_text(POINTER)
    findings = Findings()
    check_tokenizer(findings, KEY, str(folder), folder, elsewhere=KEY)
    assert [found.why for found in findings.problems] == ["only the Git LFS pointer is there of tokenizer.json"]


def test_a_config_that_is_no_json_says_so(tmp_path, make_model):
    folder = make_model(tmp_path / "m")
    (folder / "config.json").write_text("{")
    assert "config.json cannot be read" in problem_of(folder).why


def test_a_folder_without_tokenizer_says_so(tmp_path, make_model):
    findings = Findings()
    folder = make_model(tmp_path / "m", tokenizer=False)
    check_tokenizer(findings, KEY, str(folder), folder, elsewhere="model.tokenizer_path")
    assert "no tokenizer" in findings.problems[0].why
    assert findings.problems[0].fix == "save the tokenizer there, or name its folder in model.tokenizer_path"


@pytest.mark.parametrize("path", ["/models/x", "./x", "../x", "~/x", "a/b/c", "."])
def test_paths_that_can_only_be_local(path):
    assert looks_local(path)


@pytest.mark.parametrize("path", ["Qwen/Qwen2-7B-Instruct", "gpt2", "meta-llama/Llama-3.1-8B-Instruct"])
def test_a_hub_id_that_is_not_cached_is_unchecked(path, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    findings = Findings()
    assert check_model(findings, KEY, path) is None
    assert not findings.problems
    assert path in findings.unchecked[0]


def test_neither_a_folder_nor_a_hub_id_is_a_problem():
    assert "neither" in problem_of("my model").why


def test_a_cached_hub_id_is_checked_like_a_folder(tmp_path, monkeypatch, make_model):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--some--model"
    make_model(repo / "snapshots" / "abc", max_positions=99)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    findings = Findings()
    facts = check_model(findings, KEY, "some/model")
    assert findings == Findings()
    assert facts.max_positions == 99


def test_parameters_are_counted_over_all_weight_files(tmp_path):
    import numpy as np
    from safetensors.numpy import save_file

    first = {"a": np.zeros((3, 5), np.float32), "b": np.zeros(7, np.float16)}
    second = {"c": np.zeros((2, 2, 2), np.int8), "d": np.zeros((), np.float64)}
    save_file(first, tmp_path / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file(second, tmp_path / "model-00002-of-00002.safetensors")
    assert parameter_counts(tmp_path)[0] == sum(tensor.size for tensor in (*first.values(), *second.values()))


def test_a_config_without_architectures_is_noted_for_an_engine_that_goes_by_them(tmp_path, make_model):
    folder = make_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    for architectures, noted in ((None, True), (["Qwen2ForCausalLM"], False)):
        (folder / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
        findings = Findings()
        check_architecture(findings, KEY, str(folder), check_model(findings, KEY, str(folder)), "SGLang")
        assert bool(findings.notices) == noted
