"""Weight files with faults that transformers loads without a word, and a generation config that it refuses to save."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from verl.config.sections.models import ModelConfig
from verl.engine.model import Kind, read_config, read_model, write_model
from verl.errors import UserError


@pytest.fixture
def folder(small, tmp_path) -> Path:
    return Path(shutil.copytree(small / "model", tmp_path / "model"))


def read(folder: Path, kind: Kind = "policy") -> transformers.PreTrainedModel:
    model = ModelConfig(path=str(folder))
    return read_model(model, kind, read_config(model, kind), torch.float32, seed=0)


@pytest.mark.parametrize("kind", ["policy", "value"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_named_with_its_tensor_and_file(folder, kind, number):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][0, 3] = number
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"{name} in model\.safetensors holds numbers that are not finite"):
        read(folder, kind)


@pytest.mark.parametrize("kind", ["policy", "value"])
def test_layers_that_config_json_does_not_have_are_refused(folder, kind):
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 1
    config["layer_types"] = config["layer_types"][:1]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"its files hold model\.layers\.1\..* Correct num_hidden_layers"):
        read(folder, kind)


@pytest.mark.parametrize("values", [{"top_k": 20, "top_p": 0.8}, {"temperature": 0.6}, {"do_sample": True, "top_k": 5}])
def test_a_generation_config_is_saved_as_it_is(folder, tmp_path, values):
    (folder / "generation_config.json").write_text(json.dumps(values))
    hf = read(folder)
    write_model(hf, tmp_path / "saved", None)
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {name: saved[name] for name in values} == values
    assert {name: getattr(hf.generation_config, name) for name in values} == values
