"""Updates and log-prob forwards of the training engine on one GPU, beside a plain loop over transformers.

    python benchmarks/train_engine.py --shape 7b [--tokens 65536] [--lengths equal|ragged] [--variants NAME ...]

Random weights and tokens. Tokens a second of prompts and responses; MFU as verl.engine.flops counts it: nothing that is
recomputed, the head for predicted tokens only. The anchor is transformers' model on packed rows with the same
attention, checkpointing (for updates) and blocks of logits, forward and backward, without optimizer: what one would
write by hand. Each variant runs in a process of its own. update: forward, backward, clipping and AdamW; medians of the
rounds, the first (which compiles) left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

VARIANTS = {  # keys of the engine
    "anchor": {},
    "engine": {},
    "engine, not compiled": {"use_torch_compile": False},
    "engine, offloaded optimizer": {"optimizer_offload": True},
    "engine, padded": {"use_remove_padding": False},
    "naive": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="0.5b", help="tiny, 0.5b, 1.5b, 7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=1 << 16, help="of a mini-batch")
    parser.add_argument("--micro", type=int, default=16384, help="tokens of a micro-batch")
    parser.add_argument("--lengths", choices=["equal", "ragged"], default="equal", help="of the responses")
    parser.add_argument("--prompt", type=int, default=512, help="longest prompt")
    parser.add_argument("--response", type=int, default=1024, help="longest response")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help=", ".join(VARIANTS))
    parser.add_argument("--model", type=Path, help="folder of the model; made if it is not there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        options.model = options.model or Path(folder) / "model"
        if not (options.model / "config.json").exists():
            from shapes import write_random_model

            write_random_model(options.shape, options.model, options.device)
        print(f"{options.shape}, {options.lengths} lengths, {options.tokens:,} tokens, {options.micro:,} at a time")
        print(f"{'':<30}{'update tok/s':>14}{'MFU':>7}{'peak GB':>9}{'log-probs tok/s':>17}{'MFU':>7}", flush=True)
        for variant in options.variants:
            arguments = [sys.executable, __file__, *sys.argv[1:], "--model", str(options.model), "--one", variant]
            done = subprocess.run(arguments, capture_output=True, text=True)
            if done.returncode:
                reason = "out of memory" if "OutOfMemoryError" in done.stderr else done.stderr[-1500:]
                print(f"{variant:<30}{reason}", flush=True)
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{variant:<30}{found['update']:>14,.0f}{found['update_mfu']:>7.1%}{found['peak']:>9.1f}"
                f"{found['infer']:>17,.0f}{found['infer_mfu']:>7.1%}",
                flush=True,
            )


def make_rows(options: argparse.Namespace, vocabulary: int):
    import numpy as np
    import pyarrow as pa

    from verl.data.ragged import Ragged

    random = np.random.default_rng(0)
    prompts, responses, total = [], [], 0
    prompt, response = options.prompt, options.response
    while total + prompt + response <= options.tokens:
        length = response if options.lengths == "equal" else int(random.lognormal(5.5, 0.8)) % response + 1
        prompts.append(random.integers(5, vocabulary, prompt if options.lengths == "equal" else prompt // 4))
        responses.append(random.integers(5, vocabulary, length))
        total += len(prompts[-1]) + length
    drawn = Ragged.from_rows(responses, np.int32)
    ones = np.ones(len(drawn.values), np.float32)
    return pa.table(
        {
            "prompt_ids": Ragged.from_rows(prompts, np.int32).to_column(),
            "response_ids": drawn.to_column(),
            "loss_weights": drawn.like(ones / len(ones)).to_column(),
        }
    )


def measure(variant: str, options: argparse.Namespace) -> dict[str, float]:
    import torch

    from verl.config.sections.parts import FSDPConfig, ModelConfig
    from verl.engine.flops import ForwardFlops, peak_flops
    from verl.engine.packing import Packer
    from verl.memory.device_memory import peaks

    keys = VARIANTS[variant]
    packing = {name: value for name, value in keys.items() if name == "use_remove_padding"}
    model = ModelConfig(path=str(options.model), **packing)
    fsdp = FSDPConfig(**{name: value for name, value in keys.items() if name not in packing})
    plain = variant in ("anchor", "naive")
    update, infer, module = (by_hand if plain else by_engine)(model, fsdp, variant, options)
    sizes = Packer(rows_of(module, options), torch.device("cpu")).sizes()
    tokens, flops = int(sizes[0].sum()), ForwardFlops(module)(*sizes)
    peak = peak_flops(torch.device(options.device), torch.bfloat16) or float("inf")
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(update, options)
    memory = peaks(torch.device("cuda"))["allocated"] if options.device == "cuda" else 0
    forward = timed(infer, options)
    return {
        "update": tokens / seconds,
        "update_mfu": 3 * flops / seconds / peak,
        "peak": memory / 1e9,
        "infer": tokens / forward,
        "infer_mfu": flops / forward / peak,
    }


def rows_of(module, options: argparse.Namespace):
    return make_rows(options, module.config.vocab_size)


def timed(work: Callable[[], object], options: argparse.Namespace) -> float:
    import torch

    seconds = []
    for _ in range(options.rounds + 1):
        started = time.perf_counter()
        work()
        if options.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def loss_of(outputs, batch):
    return -(batch["loss_weights"] * outputs["log_probs"]).sum(), {}


def by_engine(model, fsdp, variant: str, options: argparse.Namespace):
    from verl.config.sections.parts import OptimConfig
    from verl.engine import TrainEngine
    from verl.plan import MicroBatching

    engine = TrainEngine(model, "policy", fsdp, optim_config=OptimConfig(lr=1e-6), device=options.device)
    batching = MicroBatching(max_tokens=options.micro)
    table = rows_of(engine.module, options)

    def update():
        engine.update(table, loss_of, batching=batching, entropy=False)

    if fsdp.optimizer_offload:  # in a run what fits of its state comes before each stage; an update shows what does
        update()
        engine.onload(optimizer=True)
    return (
        update,
        lambda: engine.log_probs(table, temperature=1.0, batching=batching, entropy=False),
        engine.module,
    )


def by_hand(model, fsdp, variant: str, options: argparse.Namespace):
    """naive: padded rows, all logits in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    from verl.engine.attention import packed_attention
    from verl.engine.packing import Packer
    from verl.engine.token_statistics import token_statistics
    from verl.plan import MicroBatching

    device = torch.device(options.device)
    hf = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.bfloat16).to(device)
    packed = variant == "anchor" and options.device == "cuda"
    packer = Packer(rows_of(hf, options), device, packed=packed)
    micros = [packer.micro_batch(rows) for rows in packer.micro_batches(MicroBatching(max_tokens=options.micro))]
    hf.gradient_checkpointing_enable({"use_reentrant": False})

    def log_probs(micro):
        if variant == "naive":
            logits = hf(micro.input_ids, use_cache=False).logits.flatten(0, 1)[micro.positions].float()
            return logits.log_softmax(-1).gather(-1, micro.targets[:, None]).squeeze(-1)
        hidden = hf.base_model(micro.input_ids, use_cache=False, **micro.layout).last_hidden_state
        hidden = hidden.flatten(0, 1)[micro.positions]
        return token_statistics(hidden, hf.lm_head, micro.targets, 1.0, entropy=False)["log_probs"]

    def update():
        hf.train()
        for micro in micros:
            loss_of({"log_probs": log_probs(micro)}, micro.columns)[0].backward()
        hf.zero_grad(set_to_none=True)

    @torch.no_grad()
    def infer():
        hf.eval()
        for micro in micros:
            log_probs(micro)

    def inside(work):
        def run():
            with packed_attention(hf) if packed else nullcontext():
                work()

        return run

    return inside(update), inside(infer), hf


if __name__ == "__main__":
    main()
