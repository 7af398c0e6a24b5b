"""What SGLang is told to capture CUDA graphs of."""

import pytest

from verl.rollout.engines.sglang.arguments import arguments_of, cuda_graphs
from verl.rollout.processes.adapter import EngineSettings

H100 = 81_559  # MiB
NO_PREFILL = {"cuda_graph_backend_prefill": "disabled"}


def graphs(memory: float = H100, device: str = "cuda", **settings) -> dict:
    return cuda_graphs(arguments_of(EngineSettings("folder", device, "bfloat16", 1024, **settings)), memory)


@pytest.mark.parametrize(("responses", "most"), [(64, 64), (512, 512), (1024, 512)])
def test_graphs_are_for_as_many_responses_as_run_up_to_512_and_none_for_prefills(responses, most):
    assert graphs(max_num_seqs=responses) == {"cuda_graph_max_bs_decode": most, **NO_PREFILL}


@pytest.mark.parametrize(
    "extra",
    [{"cuda_graph_max_bs_decode": 1024}, {"cuda_graph_bs_decode": [1, 2, 4]}, {"disable_decode_cuda_graph": True}],
    ids=str,
)
def test_what_a_user_decides_of_generating_stays(extra):
    assert graphs(extra=extra) == NO_PREFILL


@pytest.mark.parametrize(
    "extra",
    [
        {"cuda_graph_backend_prefill": "breakable"},
        {"disable_prefill_cuda_graph": False},
        {"cuda_graph_tc_compiler": "eager"},
    ],
    ids=str,
)
def test_what_a_user_decides_of_prefills_stays(extra):
    assert graphs(extra=extra) == {"cuda_graph_max_bs_decode": 512}


@pytest.mark.parametrize(
    "settings",
    [{"device": "cpu"}, {"enforce_eager": True}, {"extra": {"cuda_graph_config": {"decode": {"max_bs": 16}}}}],
    ids=str,
)
def test_nothing_is_said_where_all_is_decided(settings):
    assert graphs(**settings) == {}


@pytest.mark.parametrize("extra", [{"debug_cuda_graph": True}, {"enable_profile_cuda_graph": True}], ids=str)
def test_what_else_is_said_of_graphs_changes_nothing(extra):
    assert graphs(extra=extra) == {"cuda_graph_max_bs_decode": 512, **NO_PREFILL}


@pytest.mark.parametrize("memory", [0, 24_564, 46_068])
def test_a_small_gpu_is_left_to_sglang_for_generating(memory):
    assert graphs(memory) == NO_PREFILL
