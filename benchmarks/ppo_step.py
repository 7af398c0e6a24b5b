"""Where the time of the demo's PPO step goes, and how much of it is neither generation nor a model's compute.

    python benchmarks/ppo_step.py --run outputs/demo/ppo             # of a run that was made, from its metrics
    python benchmarks/ppo_step.py --model outputs/demo/sft/huggingface --data outputs/demo/data --steps 10

Medians over the steps, the first two left out (they allocate what later ones use again).
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

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "demo"))

GENERATION = ("gen",)
MODELS = ("old_log_prob", "ref", "values", "update_actor", "update_critic")
WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a finished run")
    parser.add_argument("--model", type=Path, default=Path("outputs/demo/sft/huggingface"))
    parser.add_argument("--data", type=Path, default=Path("outputs/demo/data"))
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    if arguments.run:
        print_table(arguments.run)
        return
    with tempfile.TemporaryDirectory() as folder:
        run_demo_step(arguments.model, arguments.data, arguments.steps, Path(folder))
        print_table(Path(folder))


def run_demo_step(model: Path, data: Path, steps: int, folder: Path) -> None:
    from run import ppo_arguments

    keys = ppo_arguments(model=model, data=data, folder=folder, seed=1)
    keys += [f"trainer.total_training_steps={steps}", "trainer.test_freq=-1", "trainer.val_before_train=False"]
    keys += ["trainer.save_freq=-1", "trainer.logger=[file]"]
    subprocess.run([sys.executable, "-m", "verl.trainer.main_ppo", *keys], check=True, stdout=subprocess.DEVNULL)


def print_table(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "timing_s/step" in line and "timing_s/testing" not in line][WARM_UP:]
    stages = [name.removeprefix("timing_s/") for name in steps[0] if name.startswith("timing_s/")]
    median = {stage: statistics.median(step[f"timing_s/{stage}"] for step in steps) for stage in stages}
    known = [sum(step[f"timing_s/{stage}"] for stage in GENERATION + MODELS if stage in stages) for step in steps]
    rest = statistics.median(1 - part / step["timing_s/step"] for part, step in zip(known, steps, strict=True))
    tokens = statistics.median(step["perf/total_num_tokens"] for step in steps)
    print(f"{len(steps)} steps, {os.cpu_count()} cores, {tokens:,.0f} tokens a step\n")
    for stage in sorted(stages, key=median.__getitem__, reverse=True):
        kind = "generation" if stage in GENERATION else "model compute" if stage in MODELS else ""
        print(f"{stage:<16}{median[stage]:>9.3f} s {median[stage] / median['step']:>8.1%}  {kind}")
    print(f"\nneither generation nor model compute: {rest:.1%} of the step")


if __name__ == "__main__":
    main()
