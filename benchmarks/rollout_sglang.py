"""SGLang through our engine beside bare SGLang, weight updates, sleep and wake. Random weights.

    python benchmarks/rollout_sglang.py --shape 7b [--rounds 5] [--parts generate,update,sleep] [--out results.json]

generate: 256 requests of 256 tokens in and 512 out, all at once; rounds alternate between our engine and
    ``sglang.Engine.generate`` (in a process of its own on the same GPU, with the same arguments), which returns
    log-probs, too. Prompts are new in each round and the same for both.
update: the whole model from bfloat16 tensors on the GPU, from float32 ones that are cast, and from host memory.
    open: buffers and their mapping; gather: the stream and copies into buckets; wait: for the engine to be done with
    a bucket. Memory: what the update took at most beyond the tensors themselves.
sleep: what the GPU gets back, and the seconds of sleep and of wake by tag.

Figures are medians; every part prints its own as it ends. On a machine without a GPU, ``--shape tiny`` runs it all but
sleep.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing as mp
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import SHAPES, shape_config
from transformers import Qwen2Config, Qwen2ForCausalLM

from verl.rollout.client.engine import ClientEngine
from verl.rollout.contract.base import Request, SamplingParams
from verl.rollout.engines.sglang.arguments import SGLANG, arguments_of, cuda_graphs, environment_of
from verl.rollout.processes.adapter import EngineSettings
from verl.rollout.processes.subprocess_backend import SubprocessBackend

CUDA = torch.cuda.is_available()
GIB, MIB = 1 << 30, 1 << 20


def main() -> None:
    options = parse()
    results: dict[str, Any] = {"shape": options.shape, "device": device_name(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        config = shape_config(options.shape)
        config.save_pretrained(folder)
        settings = EngineSettings(
            model_path=folder,
            device="cuda" if CUDA else "cpu",
            dtype="bfloat16" if CUDA else "float32",
            max_model_len=options.prompt + options.response,
            max_num_seqs=options.requests,
            gpu_memory_utilization=options.memory,
            extra={
                "max_total_tokens": options.requests * (options.prompt + options.response) * 5 // 4,
            },
        )
        started = time.perf_counter()
        bare = BareSGLang(settings, options.response) if "generate" in options.parts else None  # starts meanwhile
        backend = SubprocessBackend(SGLANG, settings, log=Path(options.log), bucket_bytes=options.bucket * MIB)
        report(results, "start", {"seconds": time.perf_counter() - started, "engine": backend.describe()}, options)
        try:
            for part in options.parts.split(","):
                report(results, part, PARTS[part](backend, bare, config, settings, options), options)
                if part == "generate" and bare:
                    bare.close()
        finally:
            backend.close()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b" if CUDA else "tiny")
    parser.add_argument("--parts", default="generate,update,sleep" if CUDA else "generate,update")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=256 if CUDA else 8)
    parser.add_argument("--prompt", type=int, default=256 if CUDA else 16)
    parser.add_argument("--response", type=int, default=512 if CUDA else 16)
    parser.add_argument("--bucket", type=int, default=512, help="MiB of each of the two buckets")
    parser.add_argument("--memory", type=float, default=0.8, help="share of free GPU memory of each engine")
    parser.add_argument("--log", default="sglang.log")
    parser.add_argument("--out", help="also write the figures there, as JSON")
    return parser.parse_args()


def report(results: dict[str, Any], part: str, figures: dict[str, Any], options: argparse.Namespace) -> None:
    results[part] = figures
    print(part, json.dumps(figures), flush=True)
    if options.out:
        Path(options.out).write_text(json.dumps(results, indent=1))


# ---- generation


def generation(backend: SubprocessBackend, bare_sglang, config: Qwen2Config, settings, options) -> dict[str, Any]:
    engine = client(backend, config, options)
    bare_sglang.wait()
    ours, bare = [], []
    rng = np.random.default_rng(0)
    for number in range(options.rounds + 1):  # the first warms up
        prompts = rng.integers(2, config.vocab_size, (options.requests, options.prompt)).tolist()
        ours.append(timed_ours(engine, prompts, options))
        bare.append(bare_sglang.tokens_per_s(prompts))
        print(f"  round {number}: ours {ours[-1]:,.0f}, bare {bare[-1]:,.0f} tokens/s", flush=True)
    ratios = [one / other for one, other in zip(ours[1:], bare[1:], strict=True)]
    return {
        "ours_tokens_per_s": statistics.median(ours[1:]),
        "bare_tokens_per_s": statistics.median(bare[1:]),
        "ratio_of_medians": statistics.median(ours[1:]) / statistics.median(bare[1:]),
        "ratios": ratios,
    }


def client(backend: SubprocessBackend, config: Qwen2Config, options: argparse.Namespace) -> ClientEngine:
    longest = options.prompt + options.response
    return ClientEngine(backend, eos_token_ids=[], max_model_len=longest, vocab_size=config.vocab_size)


def timed_ours(engine: ClientEngine, prompts: list[list[int]], options: argparse.Namespace) -> float:
    sampling = SamplingParams(max_new_tokens=options.response, ignore_eos=True)
    requests = [Request(str(index), prompt, sampling) for index, prompt in enumerate(prompts)]
    start = time.perf_counter()
    results = asyncio.run(engine.generate(requests))
    seconds = time.perf_counter() - start
    assert all(len(result.response_ids) == len(result.log_probs) == options.response for result in results)
    return len(results) * options.response / seconds


class BareSGLang:
    """With the arguments that our engine gives it; in a process of its own, as its workers' end would be this one's."""

    def __init__(self, settings: EngineSettings, response: int):
        self._pipe, child = mp.get_context("spawn").Pipe()
        arguments = arguments_of(settings)
        memory = torch.cuda.get_device_properties(0).total_memory / MIB if CUDA else 0
        arguments |= cuda_graphs(arguments, memory)
        self._process = mp.get_context("spawn").Process(
            target=bare_engine, args=(child, arguments, environment_of(settings, {}), response)
        )
        self._process.start()

    def wait(self) -> None:
        assert self._pipe.recv() == "up"

    def tokens_per_s(self, prompts: list[list[int]]) -> float:
        self._pipe.send(prompts)
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join(30)
        self._process.kill()


def bare_engine(pipe: Any, arguments: dict[str, Any], environment: dict[str, str], response: int) -> None:
    """SGLang as its own documentation drives it."""
    import os

    os.environ.update(environment)
    import sglang

    engine = sglang.Engine(**{**arguments, "log_level": "error"})
    pipe.send("up")
    sampling = {"max_new_tokens": response, "ignore_eos": True, "temperature": 1.0}
    while (prompts := pipe.recv()) is not None:
        start = time.perf_counter()
        outputs = engine.generate(input_ids=prompts, sampling_params=sampling, return_logprob=True)
        seconds = time.perf_counter() - start
        assert all(len(output["output_ids"]) == response for output in outputs)
        pipe.send(len(outputs) * response / seconds)
    engine.shutdown()


# ---- weights


def updates(backend: SubprocessBackend, _, config: Qwen2Config, settings: EngineSettings, options) -> dict[str, Any]:
    engine = client(backend, config, options)
    if backend.capabilities.sleep:
        asyncio.run(engine.sleep(["kv_cache"]))  # as in a run
    dtype = getattr(torch, settings.dtype)
    with torch.device("meta"):
        shapes = {name: param.shape for name, param in Qwen2ForCausalLM(config).named_parameters()}
    weights = {name: torch.empty(shape, dtype=dtype, device=settings.device) for name, shape in shapes.items()}
    for tensor in weights.values():
        tensor.normal_(0, 0.02)
    total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    figures: dict[str, Any] = {"bytes": total, "tensors": len(weights), "bucket_mib": options.bucket}
    figures["bf16 on the device"] = timed_updates(engine, backend, lambda: weights.items(), options)
    start = time.perf_counter()
    assert asyncio.run(engine.check_weights(iter(weights.items()))) == []
    figures["check_weights_s"] = time.perf_counter() - start
    if CUDA:
        figures["copy_floor_ms"] = copy_floor(weights)

    def cast() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in masters.items():
            yield name, tensor.to(dtype)

    host = {name: tensor.cpu() for name, tensor in weights.items()}
    weights.clear()
    if CUDA:
        torch.cuda.empty_cache()
    masters = {name: tensor.to(settings.device, torch.float32) for name, tensor in host.items()}
    figures["cast from fp32 on the device"] = timed_updates(engine, backend, cast, options)
    masters.clear()
    if CUDA:
        torch.cuda.empty_cache()
        host = {name: tensor.pin_memory() for name, tensor in host.items()}
    figures["from pinned host memory"] = timed_updates(engine, backend, lambda: host.items(), options)
    if backend.capabilities.sleep:
        asyncio.run(engine.wake(["kv_cache"]))
    return figures


def timed_updates(engine: ClientEngine, backend: SubprocessBackend, stream: Any, options) -> dict[str, Any]:
    seconds, splits, peak = [], [], 0
    for number in range(options.rounds + 2):
        if CUDA:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        asyncio.run(engine.update_weights(stream(), version=number))
        seconds.append(time.perf_counter() - start)
        splits.append(backend.update_seconds)
        if CUDA:
            peak = max(peak, torch.cuda.max_memory_allocated() - before)
    kept = slice(2, None)  # the first learns where each tensor goes
    figures = {"ms": 1e3 * statistics.median(seconds[kept]), "first_ms": 1e3 * seconds[0], "extra_gib": peak / GIB}
    for name in splits[-1]:
        figures[f"{name}_ms"] = 1e3 * statistics.median(split[name] for split in splits[kept])
    print("  ", json.dumps(figures), flush=True)
    return figures


def copy_floor(weights: dict[str, torch.Tensor]) -> float:
    """Milliseconds of copying as many bytes once within the device."""
    source = max(weights.values(), key=torch.Tensor.numel)
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    torch.cuda.synchronize()
    rate = 10 * source.numel() * source.element_size() / (time.perf_counter() - start)
    return 1e3 * sum(tensor.numel() * tensor.element_size() for tensor in weights.values()) / rate


# ---- memory


def sleeping(backend: SubprocessBackend, _, config: Qwen2Config, settings, options) -> dict[str, Any]:
    engine = client(backend, config, options)
    torch.cuda.empty_cache()
    rounds = []
    for _ in range(options.rounds):
        used = [used_bytes()]
        clock = [time.perf_counter()]
        for order, tags in (
            (engine.sleep, ["kv_cache", "weights"]),
            (engine.wake, ["weights"]),
            (engine.wake, ["kv_cache"]),
        ):
            asyncio.run(order(tags))
            clock.append(time.perf_counter())
            used.append(used_bytes())
        rounds.append((used, np.diff(clock) * 1e3))
    used = rounds[-1][0]
    milliseconds = np.median([each for _, each in rounds], axis=0)
    held = used[3] - used[1]
    return {
        "awake_gib": used[0] / GIB,
        "asleep_gib": used[1] / GIB,
        "weights_and_kv_gib": held / GIB,
        "freed_share": (used[0] - used[1]) / weights_and_cache_bytes(backend, config),
        "sleep_ms": milliseconds[0],
        "wake_weights_ms": milliseconds[1],
        "wake_kv_ms": milliseconds[2],
    }


def weights_and_cache_bytes(backend: SubprocessBackend, config: Qwen2Config) -> int:
    """By the shapes: bfloat16 weights, and keys and values of every token that there is room for."""
    with torch.device("meta"):
        weights = sum(param.numel() for param in Qwen2ForCausalLM(config).parameters()) * 2
    head = config.hidden_size // config.num_attention_heads
    token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head
    return weights + backend.facts["max_total_tokens"] * token


def used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def device_name() -> str:
    return torch.cuda.get_device_name() if CUDA else "cpu"


PARTS = {"generate": generation, "update": updates, "sleep": sleeping}

if __name__ == "__main__":
    main()
