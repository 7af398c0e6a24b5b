"""PPO with actor and critic sharded and one SGLang on several GPUs: does it run, what does it hold, how does it scale?

    python benchmarks/multi_gpu.py [--gpus 2] [--shape 1.5b] [--parts train,hold,each,one] [--steps 5] [key=value ...]

Random weights; the prompts of GSM8K (--data: a folder with train.jsonl; the tests' own few by default). SGLang with a
tensor-parallel group on all GPUs and its own memory check on; actor and critic sharded, parameters and optimizer on the
host between stages; checksums of every rank's weights after each update.

train: the steps. Free memory of each GPU when the engine starts, memory of each GPU over a step, the weight update's
    time by bucket, seconds by stage.
hold: 20 GB are held on the last GPU before the run starts: it must be refused, and GPU and process be named.
each: the steps with an SGLang for each GPU, instead of one on all.
one: the same on one GPU with a batch in proportion, for the efficiency of scaling.

On a machine without GPUs: --device cpu --shape tiny, with gloo ranks and the engine's CPU build; without hold.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from ppo_step import print_table
from shapes import write_random_model

ROOT = Path(__file__).parent.parent
SAMPLES = 4  # responses to a prompt
BUCKET = 512 << 20  # bytes of a weight update's bucket
CHECK = "SGL_DISABLE_TP_MEMORY_INBALANCE_CHECK"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--shape", default="1.5b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--engine", default="sglang")
    parser.add_argument("--data", type=Path, default=ROOT / "tests" / "end_to_end" / "gsm8k")
    parser.add_argument("--parts", default="train,hold,each,one")
    parser.add_argument("--prompts", type=int, default=16, help="of a step, for each GPU")
    parser.add_argument("--lengths", type=int, nargs=2, default=(512, 256), help="longest prompt and response")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps: at least 2, for the first, which compiles, is not measured")
    parts = {"train": train, "hold": hold, "each": each, "one": one}
    if unknown := set(options.parts.split(",")) - parts.keys():
        parser.error(f"--parts: {', '.join(sorted(unknown))}: there are {', '.join(parts)}")
    os.environ.pop(CHECK, None)
    with tempfile.TemporaryDirectory(prefix="multi-gpu-") as name:
        folder = Path(name)
        write_random_model(options.shape, folder / "model", options.device)
        preprocess = [ROOT / "examples" / "data_preprocess" / "gsm8k.py", "--local_dir", folder / "data"]
        subprocess.run([sys.executable, *preprocess, "--local_dataset_path", options.data], check=True)
        for part in options.parts.split(","):
            print(f"\n==== {part}", flush=True)
            parts[part](folder, options)
        print_scaling(folder, options.gpus)


def settings(folder: Path, run: Path, gpus: int, group: int, options: argparse.Namespace) -> list[str]:
    """group: GPUs of an engine."""
    prompt, response = options.lengths
    offload = [
        f"{owner}.fsdp_config.{part}_offload=True"
        for owner in ("actor_rollout_ref.actor", "critic.model")
        for part in ("param", "optimizer")
    ]
    return [
        f"data.train_files={folder}/data/train.parquet",
        f"data.train_batch_size={options.prompts * gpus}",
        f"data.max_prompt_length={prompt}",
        f"data.max_response_length={response}",
        "data.truncation=left",
        f"actor_rollout_ref.model.path={folder}/model",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={options.prompts * gpus // 2}",
        f"actor_rollout_ref.rollout.name={options.engine}",
        f"actor_rollout_ref.rollout.n={SAMPLES}",
        f"actor_rollout_ref.rollout.tensor_model_parallel_size={group}",
        f"actor_rollout_ref.rollout.update_weights_bucket_megabytes={BUCKET >> 20}",
        "actor_rollout_ref.rollout.ignore_eos=True",
        "algorithm.use_kl_in_reward=True",
        "algorithm.kl_ctrl.kl_coef=0.001",
        *offload,
        f"trainer.device={options.device}",
        f"trainer.n_gpus_per_node={gpus}",
        f"trainer.total_training_steps={options.steps}",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "trainer.check_weights=always",
        "trainer.check_log_probs=False",  # of random bfloat16 weights, whose rounding is no model's
        f"trainer.default_local_dir={run}",
        *options.settings,
    ]


def start(arguments: list[str], **kwargs) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *arguments]
    return subprocess.run(command, text=True, stderr=subprocess.STDOUT, **kwargs)


def train(folder: Path, options: argparse.Namespace) -> None:
    run_on(options.gpus, options.gpus, folder / "all", folder, options)


def each(folder: Path, options: argparse.Namespace) -> None:
    run_on(options.gpus, 1, folder / "each", folder, options)


def one(folder: Path, options: argparse.Namespace) -> None:
    run_on(1, 1, folder / "one", folder, options)


def run_on(gpus: int, group: int, run: Path, folder: Path, options: argparse.Namespace) -> None:
    with MemoryCurve(options.device) as curve:
        done = start(settings(folder, run, gpus, group, options), stdout=sys.stderr)
    if done.returncode:
        sys.exit(done.returncode)
    print_table(run, left_out=1)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    weights = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
    later = steps[1:]
    update = statistics.median(step["timing_s/update_weights"] - step["timing_s/check_weights"] for step in later)
    buckets = -(-weights // BUCKET)
    print(f"weights of {len(steps)} steps compared on all ranks")
    names = sorted(name for name in later[0] if name.startswith("timing_part_s/update_weights/"))
    parts = {name.rsplit("/", 1)[1]: statistics.median(step[name] for step in later) for name in names}
    bucket = (parts["gather"] + parts["wait"]) / buckets * 1000
    print(f"a weight update: {update:.3f} s, buckets: {buckets}, ms to gather and load each: {bucket:.0f}")
    print("of it, s: " + ", ".join(f"{name} {seconds:.3f}" for name, seconds in parts.items()))
    for line in free_memory_at_start(run):
        print(line)
    curve.print(end=(run / "metrics.jsonl").stat().st_mtime, seconds=steps[-1]["timing_s/step"])


def print_scaling(folder: Path, gpus: int) -> None:
    if on_one := throughput(folder / "one"):
        print(f"\ntokens a second and GPU: {on_one:,.0f} on 1")
        for name, engines in (("all", "one engine on all"), ("each", "an engine for each")):
            if found := throughput(folder / name):
                print(f"and {found:,.0f} on {gpus}, {engines}: {found / on_one:.1%}")


def throughput(run: Path) -> float:
    """Median tokens a second and device, without the first step; 0 where there was no run."""
    file = run / "metrics.jsonl"
    steps = [json.loads(line) for line in file.read_text().splitlines()][1:] if file.exists() else []
    return statistics.median(step["perf/throughput"] for step in steps) if steps else 0.0


def free_memory_at_start(run: Path) -> list[str]:
    """As SGLang's ranks say themselves."""
    found = {}
    for log in run.glob("rollout/**/*.log"):
        for line in log.read_text(errors="replace").splitlines():
            if said := re.search(r"Load weight begin. avail mem=([\d.]+) GB", line):
                rank = re.search(r"TP\d+", line)
                found[rank[0] if rank else "TP0"] = float(said[1])
    if not found:
        return []
    spread = 1 - min(found.values()) / max(found.values())
    free = ", ".join(f"{rank} {gib:.2f}" for rank, gib in sorted(found.items()))
    return [f"free when the engine starts, GB: {free}; spread {spread:.2%}"]


class MemoryCurve:
    """Memory in use on each GPU, by the driver, twice a second."""

    def __init__(self, device: str):
        self.readings: list[tuple[float, list[int]]] = []  # when, and megabytes
        self._device = device

    def __enter__(self) -> MemoryCurve:
        if self._device == "cuda":
            query = ["--query-gpu=index,memory.used", "--format=csv,noheader,nounits", "--loop-ms=500"]
            self._process = subprocess.Popen(["nvidia-smi", *query], stdout=subprocess.PIPE, text=True)
            self._thread = threading.Thread(target=self._read)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if self._device == "cuda":
            self._process.terminate()
            self._process.wait()
            self._thread.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            gpu, used = map(int, line.split(","))
            if gpu == 0:
                self.readings.append((time.time(), []))
            self.readings[-1][1].append(used)

    def print(self, end: float, seconds: float, points: int = 12) -> None:
        """Of the step that ended then: about ``points`` readings."""
        for gpu, _ in enumerate(self.readings[0][1] if self.readings else ()):
            used = [(when, reading[gpu] / 1000) for when, reading in self.readings if gpu < len(reading)]
            last = [value for when, value in used if end - seconds <= when <= end]
            curve = " ".join(f"{value:.1f}" for value in last[:: max(1, len(last) // points)])
            peak = max(value for _, value in used)
            print(f"GPU {gpu}, GB in use over the last step: {curve}; at most {peak:.1f} in all")


def hold(folder: Path, options: argparse.Namespace) -> None:
    if options.device == "cpu":
        print("not on a CPU")
        return
    code = (
        "import sys, time, torch\n"
        f"held = torch.empty(20 * 10**9, dtype=torch.uint8, device='cuda:{options.gpus - 1}')\n"
        "print('held', flush=True)\n"
        "time.sleep(600)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        started = time.monotonic()
        done = start(settings(folder, folder / "held", options.gpus, options.gpus, options), stdout=subprocess.PIPE)
    finally:
        holder.kill()
    print(done.stdout[-1500:])
    named = f"GPU {options.gpus - 1}" in done.stdout and str(holder.pid) in done.stdout
    print(f"refused: {done.returncode != 0}, GPU and process named: {named}, after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
