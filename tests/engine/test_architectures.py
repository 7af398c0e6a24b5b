"""The class names that an inference engine is given for a model."""

import json

import pytest

from verl.config.sections.parts import ModelConfig
from verl.engine.model import architectures
from verl.errors import UserError


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "qwen2", "architectures": ["MyQwen"]}, ["MyQwen"]),
        ({"model_type": "qwen2"}, ["Qwen2ForCausalLM"]),
        ({"model_type": "llama"}, ["LlamaForCausalLM"]),
    ],
)
def test_they_are_those_of_the_config_or_else_of_its_model_type(tmp_path, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert architectures(ModelConfig(path=str(tmp_path))) == expected


def test_a_model_type_without_a_language_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UserError, match="names no architectures, and transformers knows no causal language model"):
        architectures(ModelConfig(path=str(tmp_path)))
