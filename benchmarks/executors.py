"""The same PPO steps with the rank in the driver's process and with it under Ray: what does the way between cost?

    python benchmarks/executors.py --model DIR --data DIR [--steps 12] [--rounds 1] [--out FILE] [key=value ...]

DIR: a model in Hugging Face format, and a folder with train.parquet (make demo makes both). Runs ``main_ppo`` with
trainer.executor=local and =ray in turn, each in a process of its own, and compares medians over the steps, without the
first two. Further ``key=value`` go to both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WARM_UP = 2
EXECUTORS = ("local", "ray")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("outputs/demo/sft/global_step_900/huggingface"))
    parser.add_argument("--data", type=Path, default=Path("outputs/demo/data"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=1, help="runs of each executor, in turn")
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_args()
    seconds: dict[str, dict[str, list[float]]] = {executor: {} for executor in EXECUTORS}
    for number in range(options.rounds):
        for executor in EXECUTORS if number % 2 == 0 else EXECUTORS[::-1]:
            for stage, values in run(executor, options).items():
                seconds[executor].setdefault(stage, []).extend(values)
            print(
                f"round {number + 1}, {executor}: {statistics.median(seconds[executor]['step']):.4f} s a step",
                flush=True,
            )
    report(seconds, options.out)


def run(executor: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each step, by stage."""
    with tempfile.TemporaryDirectory(prefix="executors-") as folder:
        settings = [
            f"data.train_files={options.data}/train.parquet",
            "data.train_batch_size=64",
            "data.max_prompt_length=32",
            "data.max_response_length=32",
            f"actor_rollout_ref.model.path={options.model}",
            "actor_rollout_ref.rollout.n=4",
            "actor_rollout_ref.actor.ppo_mini_batch_size=16",
            "trainer.val_before_train=False",
            "trainer.test_freq=-1",
            f"trainer.total_training_steps={options.steps}",
            *options.settings,
            f"trainer.executor={executor}",
            f"trainer.default_local_dir={folder}",
        ]
        done = subprocess.run(
            [sys.executable, "-m", "verl.trainer.main_ppo", *settings], capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
        steps = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
    names = [name.removeprefix("timing_s/") for name in steps[0] if name.startswith("timing_s/")]
    return {name: [step[f"timing_s/{name}"] for step in steps] for name in names}


def report(seconds: dict[str, dict[str, list[float]]], out: Path | None) -> None:
    local, ray = ({stage: statistics.median(values) for stage, values in seconds[each].items()} for each in EXECUTORS)
    print(f"\n{'stage':<16}{'local, s':>10}{'ray, s':>10}{'difference':>12}")
    for stage in sorted(ray, key=ray.__getitem__, reverse=True):
        here = local.get(stage, 0.0)
        print(f"{stage:<16}{here:>10.4f}{ray[stage]:>10.4f}{ray[stage] - here:>+12.4f}")
    print(f"\na step under Ray takes {ray['step'] / local['step']:.3f} of the time of a local one")
    if out:
        out.write_text(json.dumps({"local": local, "ray": ray}, indent=1))


if __name__ == "__main__":
    main()
