"""Where the time of the demo's PPO step goes, and how much of it is neither generation nor a model's compute.

    make demo && python benchmarks/ppo_step.py --run outputs/demo/ppo

From the run's own timings. Medians over the steps, the first two left out (they allocate what later ones use again).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path

GENERATION = ("gen",)
MODELS = ("old_log_prob", "ref", "values", "update_actor", "update_critic")
WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("outputs/demo/ppo"), help="folder of a run")
    print_table(parser.parse_args().run)


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
