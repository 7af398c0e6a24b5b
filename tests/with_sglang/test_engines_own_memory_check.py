"""SGLang's own memory check, the back-stop of ours: real engines of two ranks on a CPU, which read what the test says.

Runs where an SGLang is installed that works on this machine's CPU.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from verl.memory.gpu_balance import NO_CHECK, environment_for_engine


def installed_version() -> tuple[int, ...] | None:
    """By its metadata: importing it would rewrite os.environ, and find_spec takes this file's folder for a package."""
    try:
        return tuple(int(part) for part in importlib.metadata.version("sglang").split(".")[:3])
    except importlib.metadata.PackageNotFoundError:
        return None


VERSION = installed_version()
pytestmark = [pytest.mark.skipif(VERSION is None, reason="SGLang is not installed"), pytest.mark.slow]

GUIDES_VARIABLE = {"SGL_DISABLE_TP_MEMORY_INBALANCE_CHECK": "True"}
REFUSAL = "The memory capacity is unbalanced"  # SGLang's words
GENERATED = "generated:"

ENGINE = """
import sys
from sglang.srt.entrypoints.engine import Engine
from verl.rollout.engines.sglang.engine_process import forking

def main():
    engine = forking(Engine)(
        model_path=sys.argv[1], load_format="dummy", skip_tokenizer_init=True, tp_size=2, max_total_tokens=4096,
        device="cpu", attention_backend="torch_native", sampling_backend="pytorch", grammar_backend="none",
        log_level="warning",
    )
    (answer,) = engine.generate(input_ids=[[5, 6, 7]], sampling_params={"max_new_tokens": 1, "temperature": 0.0})
    print("generated:", len(answer["output_ids"]), flush=True)
    engine.shutdown()

if __name__ == "__main__":
    main()
"""

# Python runs a sitecustomize in every process that it starts, and SGLang's schedulers are forks of one. SGLang's
# function stays as it is, with its minimum over the ranks; only what it takes for the machine's free memory is the
# rank's from the test.
READINGS = """
import os, sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from types import SimpleNamespace
from unittest import mock

FREE_GB = [int(amount) for amount in os.environ["FREE_GB_OF_RANKS"].split(",")]

class Readings(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "sglang.srt.utils.common":
            return None
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def exec_module(common):
            execute(common)
            inject(common)
        spec.loader.exec_module = exec_module
        return spec

def inject(common):
    read = common.get_available_gpu_memory
    def injected(device, gpu_id, *args, **options):
        free = SimpleNamespace(available=FREE_GB[gpu_id] << 30)
        with mock.patch.object(common.psutil, "virtual_memory", lambda: free):
            return read(device, gpu_id, *args, **options)
    common.get_available_gpu_memory = injected

sys.meta_path.insert(0, Readings())
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def start_engine(model, tmp_path):
    """Starts an engine in an environment and returns all that it printed."""

    def start(environ: dict[str, str], free_gb: tuple[int, int]) -> str:
        (tmp_path / "engine.py").write_text(ENGINE)
        (tmp_path / "injected").mkdir()
        (tmp_path / "injected" / "sitecustomize.py").write_text(READINGS)
        path = os.pathsep.join([str(tmp_path / "injected"), *filter(None, [os.environ.get("PYTHONPATH")])])
        environ = environ | {
            "PYTHONPATH": path,
            "FREE_GB_OF_RANKS": ",".join(map(str, free_gb)),
            "SGLANG_USE_CPU_ENGINE": "1",
            "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
        }
        output = tmp_path / "output.txt"
        with output.open("w") as file:
            command = [sys.executable, str(tmp_path / "engine.py"), str(model)]
            engine = subprocess.Popen(command, env=environ, stdout=file, stderr=file, start_new_session=True)
            try:
                engine.wait(timeout=300)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(engine.pid, signal.SIGKILL)
                engine.wait()
        return output.read_text()

    return start


def surroundings() -> dict[str, str]:
    """This process's environment, without what it says about the check."""
    return {name: value for name, value in os.environ.items() if name not in NO_CHECK}


def test_sglang_itself_refuses_unequal_gpus_when_the_user_says_nothing(start_engine):
    output = start_engine(environment_for_engine(surroundings()), (8, 6))
    assert REFUSAL in output
    assert GENERATED not in output


def test_sglang_starts_with_a_warning_when_the_users_variable_is_translated(start_engine):
    output = start_engine(environment_for_engine(surroundings() | GUIDES_VARIABLE), (8, 6))
    assert REFUSAL in output
    assert f"{GENERATED} 1" in output


def test_sglang_starts_without_a_word_about_memory_on_equal_gpus(start_engine):
    output = start_engine(environment_for_engine(surroundings()), (8, 8))
    assert REFUSAL not in output
    assert f"{GENERATED} 1" in output


@pytest.mark.skipif(not (0, 5, 7) <= (VERSION or ()) < (0, 5, 18), reason="SGLang 0.5.7 to 0.5.17 only")
def test_the_guides_variable_untranslated_means_the_opposite_to_sglang(start_engine):
    """These versions copy its value into SGLANG_ENABLE_..., not negated; this is why it is translated."""
    output = start_engine(surroundings() | GUIDES_VARIABLE, (8, 6))
    assert REFUSAL in output
    assert GENERATED not in output
