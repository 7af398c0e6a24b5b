"""What is streamed to rollout engines: names, shapes and values of the model that save_pretrained writes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from engine_helpers import ALL, LOSSES, VOCAB, build, make_table, weights_of
from forks import run_ranks
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import Chunk, WeightConverter, revert_weight_conversion

from verl.config.sections.parts import ModelConfig
from verl.engine import checkpoint_names
from verl.engine.checkpoint_names import CheckpointNames
from verl.engine.export import export_checkpoint
from verl.errors import UserError

SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
CONFIGS = {
    "qwen2": lambda: transformers.Qwen2Config(**SHARED),
    "qwen2-tied": lambda: transformers.Qwen2Config(**SHARED | {"tie_word_embeddings": True}),
    "llama": lambda: transformers.LlamaConfig(**SHARED),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SHARED, **EXPERTS, num_experts=5, head_dim=16),
    "mixtral": lambda: transformers.MixtralConfig(**SHARED, num_local_experts=5, head_dim=16),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(  # its router has a buffer that is saved
        **SHARED, **EXPERTS, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1
    ),
}
MOE = ["qwen3_moe", "mixtral"]


@pytest.fixture(scope="session")
def model_of(tmp_path_factory):
    folders: dict[str, str] = {}

    def folder(arch: str) -> str:
        if arch not in folders:
            folders[arch] = str(tmp_path_factory.mktemp(arch))
            with torch.random.fork_rng():
                torch.manual_seed(3)
                hf = transformers.AutoModelForCausalLM.from_config(CONFIGS[arch](), dtype=torch.float32)
                for buffer in hf.buffers():
                    if buffer.shape == (4,):
                        buffer.normal_()
                hf.save_pretrained(folders[arch])
        return folders[arch]

    return folder


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", CONFIGS)
def test_weights_are_what_save_pretrained_writes(model_of, tmp_path, arch, dtype):
    engine = build(model_of(arch), dtype=dtype)
    engine.module.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == load_file(f"{model_of(arch)}/model.safetensors").keys()
    for _ in range(2):
        assert_same(weights_of(engine), written)
    assert all(tensor.is_contiguous() for _, tensor in engine.weights())
    parameters = {tensor.dtype for name, tensor in written.items() if not name.endswith("correction_bias")}
    assert parameters == {getattr(torch, dtype)}


@pytest.mark.parametrize(
    ("arch", "expert", "gate", "up", "down"),
    [
        ("qwen3_moe", "model.layers.1.mlp.experts.3", "gate_proj", "up_proj", "down_proj"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3", "w1", "w3", "w2"),
    ],
)
def test_an_expert_has_its_slice_of_the_fused_tensors(model_of, arch, expert, gate, up, down):
    engine = build(model_of(arch))
    weights, fused = weights_of(engine), dict(engine.module.named_parameters())
    gate_up = torch.cat([weights[f"{expert}.{gate}.weight"], weights[f"{expert}.{up}.weight"]])
    assert torch.equal(gate_up, fused["model.layers.1.mlp.experts.gate_up_proj"][3])
    assert torch.equal(weights[f"{expert}.{down}.weight"], fused["model.layers.1.mlp.experts.down_proj"][3])
    assert not any(name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in weights)


# ---- several ranks


def stream_and_export(rank: int, world_size: int, model: str, folder: str, dtype: str):
    engine = build(model, dtype=dtype)
    engine.export_hf(folder)
    return [(name, str(tensor.dtype), tensor.float().numpy()) for name, tensor in engine.weights()]


@pytest.mark.parametrize(
    ("arch", "dtype"), [("qwen2-tied", "bfloat16"), *((moe, "float32") for moe in MOE), ("glm4_moe", "bfloat16")]
)
def test_two_ranks_stream_and_export_what_one_process_does(model_of, tmp_path, arch, dtype):
    one = build(model_of(arch), dtype=dtype)
    one.export_hf(tmp_path / "one")
    answers = run_ranks(2, stream_and_export, model_of(arch), str(tmp_path / "two"), dtype)
    in_order = [(name, str(tensor.dtype)) for name, tensor in one.weights()]
    for answer in answers:
        assert [(name, of) for name, of, _ in answer] == in_order
        streamed = {name: torch.from_numpy(values) for name, _, values in answer}
        assert_same(streamed, {name: tensor.float() for name, tensor in weights_of(one).items()})
    assert_same(*(load_file(tmp_path / ranks / "model.safetensors") for ranks in ("two", "one")))
    assert len({(tmp_path / ranks / "config.json").read_text() for ranks in ("two", "one")}) == 1
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert_same(reloaded.state_dict(), one.module.state_dict())


def gathered_meanwhile(rank: int, world_size: int, model: str) -> tuple[list[int], int, list[bool]]:
    """At each tensor, how many sharded modules are whole; how many after a stream that was left early; whether each
    tensor is still what it was when the stream is over."""
    engine = build(model)
    owner = {}  # of each parameter: the innermost sharded module
    for prefix, module in engine.root.named_modules():
        if isinstance(module, FSDPModule):
            owner |= {f"{prefix}.{name}".strip("."): prefix for name, _ in module.named_parameters()}
    assert len(set(owner.values())) == 3  # two layers and the rest

    def whole() -> int:
        return len({owner[name] for name, param in engine.root.named_parameters() if not isinstance(param, DTensor)})

    kept, counts = [], []
    for _, tensor in engine.weights():
        counts.append(whole())
        kept.append((tensor, tensor.clone()))
    early = engine.weights()
    next(early)
    early.close()
    return counts, whole(), [torch.equal(*both) for both in kept]


def test_no_more_than_a_layer_is_gathered_at_a_time_and_nothing_stays(model_of):
    for counts, after, same in run_ranks(2, gathered_meanwhile, model_of("qwen2-tied")):
        assert set(counts) == {1}
        assert after == 0
        assert all(same)


def update_save_and_export(rank: int, world_size: int, model: str, folder: Path, kind: str, dtype: str) -> None:
    engine = build(model, kind, dtype=dtype, lr=0.1)
    table = make_table(4)
    engine.update(table.slice(2 * rank, 2) if world_size > 1 else table, LOSSES[kind], batching=ALL)
    engine.save(folder / "saved")
    engine.export_hf(folder / "theirs")


@pytest.mark.parametrize(
    ("arch", "kind", "dtype"),
    [
        ("qwen2-tied", "policy", "bfloat16"),
        ("llama", "value", "float32"),
        *((moe, "policy", "float32") for moe in MOE),
        ("glm4_moe", "policy", "bfloat16"),
    ],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_checkpoint_is_exported_by_one_process_as_its_ranks_would(model_of, tmp_path, arch, kind, dtype, world_size):
    run_ranks(world_size, update_save_and_export, model_of(arch), tmp_path, kind, dtype)
    model, tokenizer = ModelConfig(path=model_of(arch)), SimpleNamespace(save_pretrained=lambda folder: None)
    export_checkpoint(tmp_path / "saved", tmp_path / "ours", model, getattr(torch, dtype), tokenizer)
    assert_same(*(load_file(tmp_path / of / "model.safetensors") for of in ("ours", "theirs")))
    changed = load_file(tmp_path / "ours" / "model.safetensors")
    before = load_file(f"{model_of(arch)}/model.safetensors")
    assert any(not torch.equal(changed[name].float(), before[name]) for name in before.keys() & changed.keys())
    assert len({(tmp_path / of / "config.json").read_text() for of in ("ours", "theirs")}) == 1


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        ({"num_hidden_layers": 1}, "which model.path="),
        ({"num_hidden_layers": 3}, "lacks"),
        ({"vocab_size": 50}, "shape"),
    ],
)
def test_a_checkpoint_of_another_model_is_not_exported(model_of, tmp_path, other, complaint):
    build(model_of("llama")).save(tmp_path / "saved")
    config = transformers.LlamaConfig(**SHARED | other)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=complaint):
        export_checkpoint(
            tmp_path / "saved", tmp_path / "out", ModelConfig(path=str(tmp_path / "other")), torch.float32, None
        )
    assert not (tmp_path / "out").exists()


def test_ranks_keep_to_the_names_of_the_files_that_the_first_has_read(model_of, tmp_path):
    """A checkpoint that was saved with fused experts has them fused again."""
    hf = transformers.AutoModelForCausalLM.from_pretrained(model_of("qwen3_moe"))
    hf.save_pretrained(tmp_path / "fused", save_original_format=False)
    names = set(load_file(tmp_path / "fused" / "model.safetensors"))
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    assert weights_of(build(str(tmp_path / "fused"))).keys() == names
    for answer in run_ranks(2, stream_and_export, str(tmp_path / "fused"), str(tmp_path / "two"), "float32"):
        assert {name for name, _, _ in answer} == names
    assert set(load_file(tmp_path / "two" / "model.safetensors")) == names


# ---- one at a time


@pytest.mark.parametrize("arch", MOE)
def test_no_more_is_held_than_the_tensors_converted_together(model_of, arch):
    hf = transformers.AutoModelForCausalLM.from_pretrained(model_of(arch))
    taken = 0

    def tensors():
        nonlocal taken
        for name, param in hf.named_parameters():
            taken += param.numel()
            yield name, param.detach()

    given = 0
    largest = max(param.numel() for param in hf.parameters())
    for _, tensor in CheckpointNames(hf).stream(tensors()):
        assert taken - given <= largest
        given += tensor.numel()
    assert taken == given == sum(param.numel() for param in hf.parameters())


def test_tensors_that_become_one_are_waited_for(model_of):
    """As for a model whose files have the projections in one and whose module has them apart."""
    hf = transformers.AutoModelForCausalLM.from_pretrained(model_of("qwen2"))
    apart = [f"self_attn.{letter}_proj.weight" for letter in "qkv"]
    hf._weight_conversions = [WeightConverter("self_attn.qkv.weight", apart, [Chunk(dim=0)])]
    streamed = dict(CheckpointNames(hf).stream((name, param.detach()) for name, param in hf.named_parameters()))
    assert streamed["model.layers.1.self_attn.qkv.weight"].shape == (96, 32)
    assert_same(streamed, revert_weight_conversion(hf, hf.state_dict()))


def test_without_the_reverse_conversion_only_a_model_that_needs_it_is_refused(model_of, monkeypatch):
    monkeypatch.setattr(checkpoint_names, "revert_weight_conversion", None)
    assert_same(weights_of(build(model_of("qwen2"))), load_file(Path(model_of("qwen2")) / "model.safetensors"))
    for arch in MOE:
        with pytest.raises(UserError, match=r"MoeForCausalLM|MixtralForCausalLM.*has no core_model_loading"):
            weights_of(build(model_of(arch)))
