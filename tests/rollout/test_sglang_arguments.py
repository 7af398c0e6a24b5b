"""How many responses SGLang is told to draw at a time by CUDA graphs."""

import pytest

from verl.rollout.adapter import EngineSettings
from verl.rollout.sglang.arguments import arguments_of, decode_graphs

H100 = 81_559  # MiB


def arguments(**settings) -> dict:
    return arguments_of(EngineSettings("folder", settings.pop("device", "cuda"), "bfloat16", 1024, **settings))


@pytest.mark.parametrize(("responses", "graphs"), [(64, 64), (512, 512), (1024, 512)])
def test_graphs_are_for_as_many_responses_as_run_up_to_512(responses, graphs):
    assert decode_graphs(arguments(max_num_seqs=responses), H100) == {"cuda_graph_max_bs_decode": graphs}


@pytest.mark.parametrize(
    "settings",
    [
        {"device": "cpu"},
        {"enforce_eager": True},
        {"extra": {"cuda_graph_max_bs_decode": 1024}},
        {"extra": {"cuda_graph_bs_decode": [1, 2, 4]}},
        {"extra": {"disable_decode_cuda_graph": True}},
    ],
    ids=str,
)
def test_what_a_user_or_another_key_decides_stays(settings):
    assert decode_graphs(arguments(**settings), H100) == {}


@pytest.mark.parametrize("memory", [0, 24_564, 46_068])
def test_a_small_gpu_is_left_to_sglang(memory):
    assert decode_graphs(arguments(), memory) == {}
