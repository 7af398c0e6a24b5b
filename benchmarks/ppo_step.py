"""Where the time of a PPO step goes, and how much of it is neither generation nor a model's compute.

    python benchmarks/ppo_step.py --run outputs/demo/ppo
    python benchmarks/ppo_step.py --shape 1.5b [--prompts 512] [--steps 3] [--mini 128] [--no-anchors] [key=value ...]

--run: of a run that there is, from its own timings. --shape: of a run made for it, on one GPU with SGLang: random
weights, prompts of 512 tokens and responses of 1024, actor, critic and reference; beside it, what bare libraries made
of such work before it on the same GPU (anchors.py). MFU as verl.engine.flops counts it, of a stage's whole time, its
loading and its optimizer included. Peak: of tensors, on the rank with the most. Load: seconds of the stage in which its
model is called to the GPU and away again. Medians over the steps, the first (--run: two) left out, which compiles, and
allocates what later ones use again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

MICRO = 32768  # tokens of a micro-batch
GENERATION = ("gen",)
MODELS = ("old_log_prob", "ref", "values", "update_actor", "update_critic")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("outputs/demo/ppo"), help="folder of a run")
    parser.add_argument("--shape", help="0.5b, 1.5b, 7b, or tiny for a CPU")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--engine", default="sglang")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--mini", type=int, default=128, help="prompts of an optimizer step")
    parser.add_argument("--lengths", type=int, nargs=2, default=(512, 1024), help="tokens of prompts and responses")
    parser.add_argument("--steps", type=int, default=3, help="that are measured")
    parser.add_argument("--no-anchors", action="store_true")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_args()
    if not options.shape:
        print_table(options.run, left_out=2)
        return
    with tempfile.TemporaryDirectory(prefix="ppo-step-") as folder:
        settings = prepare(Path(folder), options)
        train([*settings, "trainer.dry_run=True"])  # what is wrong with them is told before anything takes minutes
        found = {} if options.no_anchors else anchors_of(Path(folder) / "model", settings, options)
        train(settings)
        print_table(Path(folder) / "run", left_out=1, anchors=found)


def train(settings: list[str]) -> None:
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *settings]
    if code := subprocess.run(command, stdout=sys.stderr).returncode:
        sys.exit(code)


def anchors_of(model: Path, settings: list[str], options: argparse.Namespace) -> dict[str, float]:
    """Tokens a second by stage."""
    import anchors

    trains = anchors.training(model, options.shape, options.device, *options.lengths, micro=MICRO)
    found = {"update_actor": trains["update"], "old_log_prob": trains["infer"], "ref": trains["infer"]}
    if options.engine == "sglang":
        found["gen"] = anchors.generation(settings, *options.lengths)
    print(f"bare: {found}", file=sys.stderr)
    return found


def prepare(folder: Path, options: argparse.Namespace) -> list[str]:
    """The settings of the run, whose model and data are then in the folder."""
    from shapes import write_prompts, write_random_model

    prompt, response = options.lengths
    write_random_model(options.shape, folder / "model", options.device)
    write_prompts(folder / "prompts.parquet", options.prompts * (options.steps + 1), prompt)
    (folder / "reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return float(len(solution_str) % 2)\n"
    )
    return [
        f"data.train_files={folder}/prompts.parquet",
        f"data.train_batch_size={options.prompts}",
        f"data.max_prompt_length={prompt}",
        f"data.max_response_length={response}",
        "data.truncation=left",
        f"actor_rollout_ref.model.path={folder}/model",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={options.mini}",
        "actor_rollout_ref.actor.use_kl_loss=True",
        f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={MICRO}",
        f"critic.ppo_max_token_len_per_gpu={MICRO}",
        f"actor_rollout_ref.rollout.name={options.engine}",
        "actor_rollout_ref.rollout.ignore_eos=True",
        f"custom_reward_function.path={folder}/reward.py",
        f"trainer.device={options.device}",
        f"trainer.total_training_steps={options.steps + 1}",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "trainer.check_log_probs=False",  # of random bfloat16 weights, whose rounding is no model's
        "trainer.check_weights=first",
        f"trainer.default_local_dir={folder}/run",
        *options.settings,
    ]


def print_table(folder: Path, left_out: int, anchors: dict[str, float] | None = None) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "timing_s/step" in line and "timing_s/testing" not in line][left_out:]
    names = {name for step in steps for name in step}  # a stage may be missing in some of the steps
    median = {name: statistics.median(step.get(name, 0.0) for step in steps) for name in names}
    tokens, whole = median["perf/total_num_tokens"], median["timing_s/step"]
    print(f"{len(steps)} steps, {os.cpu_count()} cores, {tokens:,.0f} tokens a step\n")
    bare = f"{'bare':>11}{'of it':>8}" if anchors else ""
    print(f"{'stage':<16}{'seconds':>9}{'of step':>9}{'tokens/s':>11}{'MFU':>8}{'peak GiB':>9}{'load':>8}{bare}")
    stages = sorted(name.removeprefix("timing_s/") for name in names if name.startswith("timing_s/"))
    for stage in sorted(stages, key=lambda stage: -median[f"timing_s/{stage}"]):
        seconds = median[f"timing_s/{stage}"]
        cells = [
            f"{tokens / seconds:,.0f}" if stage in (*GENERATION, *MODELS, "step") else "",
            formatted(median.get(f"perf/mfu/{stage.removeprefix('update_')}"), ".1%"),
            formatted(median.get(f"perf/stage_memory_gb/{stage}"), ".1f"),
            formatted(median.get(f"timing_part_s/{stage}/load"), ".3f"),
        ]
        if anchors and stage in anchors:
            cells += [f"{anchors[stage]:,.0f}", f"{tokens / seconds / anchors[stage]:.1%}"]
        row = "".join(f"{cell:>{width}}" for cell, width in zip(cells, (11, 8, 9, 8, 11, 8), strict=False))
        print(f"{stage:<16}{seconds:>9.3f}{seconds / whole:>9.1%}{row}".rstrip())
    known = [sum(step.get(f"timing_s/{stage}", 0.0) for stage in GENERATION + MODELS) for step in steps]
    rest = statistics.median(1 - part / step["timing_s/step"] for part, step in zip(known, steps, strict=True))
    print(f"\nneither generation nor model compute: {rest:.1%} of the step")
    for name in ("perf/max_memory_allocated_gb", "perf/device_memory_used_gb"):
        if name in median:
            print(f"{name}: {median[name]:.1f}")
    print(f"{median['perf/throughput']:,.0f} tokens a second and device")


def formatted(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


if __name__ == "__main__":
    main()
