"""Does training learn the same whichever engine generates? The demo's task with each engine, over several seeds.

    make demo sglang-cpu vllm-cpu
    python benchmarks/engines_agree.py [--seeds 1 2 3] [--steps 30] [--plot docs/engines_agree.png] [key=value ...]

All runs start from the demo's warm model; a seed is that of PPO's draws. Each engine runs in the environment that has
it (--engine NAME=PYTHON). Each run gives one number, the mean of its validation accuracies; whether the engines differ
in it is answered by an exact permutation test (Fisher): of all ways to deal the runs to the engines, the share whose
means spread at least as far. Engines that learn alike give any share; below 0.05 they do not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "demo"))
from run import ppo_settings

ACCURACY = "val-core/verl/arithmetic/acc/mean@1"
ENGINES = {"hf": ".venv/bin/python", "sglang": ".venv-sglang/bin/python", "vllm": ".venv-vllm/bin/python"}
Curve = dict[int, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("outputs/demo"), help="folder of a demo: data and warm model")
    parser.add_argument("--out", type=Path, default=Path("outputs/engines_agree"), help="folder of the runs")
    parser.add_argument("--engine", nargs="+", metavar="NAME=PYTHON", default=[f"{e}={p}" for e, p in ENGINES.items()])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--plot", type=Path, help="file for the picture")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="further settings of PPO")
    options = parser.parse_args()
    pythons = dict(pair.split("=", 1) for pair in options.engine)
    curves: dict[str, list[Curve]] = {engine: [] for engine in pythons}
    for seed in options.seeds:
        for engine, python in pythons.items():
            folder = options.out / f"{engine}-{seed}"
            curves[engine].append(run(engine, python, seed, folder, options))
            print(f"{engine:<8} seed {seed}: " + shown(curves[engine][-1].values()), flush=True)
    report(curves)
    if options.plot:
        draw(curves, options.plot)


def run(engine: str, python: str, seed: int, folder: Path, options: argparse.Namespace) -> Curve:
    """Validation accuracy by step. A run that ended before in this folder is not repeated."""
    metrics = folder / "metrics.jsonl"
    if not metrics.exists() or str(options.steps) not in map(str, accuracies(metrics)):
        settings = [
            *ppo_settings(options.demo, seed),
            f"actor_rollout_ref.rollout.name={engine}",
            f"trainer.total_training_steps={options.steps}",
            "trainer.test_freq=5",
            "trainer.save_freq=-1",
            f"trainer.default_local_dir={folder}",
            "trainer.resume_mode=disable",
            *options.settings,
        ]
        done = subprocess.run([python, "-m", "verl.trainer.main_ppo", *settings], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{engine}, seed {seed}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return accuracies(metrics)


def accuracies(metrics: Path) -> Curve:
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {step["step"]: step[ACCURACY] for step in steps if ACCURACY in step}


def report(curves: dict[str, list[Curve]]) -> None:
    scores = {engine: [statistics.fmean(curve.values()) for curve in runs] for engine, runs in curves.items()}
    first = next(iter(curves.values()))[0]
    print(f"\n{'accuracy at step':<18}" + "".join(f"{step:>7}" for step in first) + f"{'mean':>8}  spread of the runs")
    for engine, runs in curves.items():
        means = "".join(f"{statistics.fmean(curve[step] for curve in runs):>7.1%}" for step in first)
        low, high = min(scores[engine]), max(scores[engine])
        print(f"{engine:<18}{means}{statistics.fmean(scores[engine]):>8.1%}  {low:.1%} to {high:.1%}")
    share = permutation_test(list(scores.values()))
    verdict = "within the spread of the seeds" if share >= 0.05 else "more than the seeds explain"
    print(f"\nexact permutation test over the runs' means: p = {share:.3f}; the engines differ {verdict}")


def permutation_test(groups: Sequence[Sequence[float]]) -> float:
    """Share of the ways to deal all values to groups of these sizes in which the sizes-weighted squares of the groups'
    means (the part of the variance that lies between groups) are at least as large as they are."""
    values = [value for group in groups for value in group]
    sizes = [len(group) for group in groups]
    centre = statistics.fmean(values)

    def between(deal: Sequence[Sequence[float]]) -> float:
        return sum(len(group) * (statistics.fmean(group) - centre) ** 2 for group in deal)

    given = between(groups) - 1e-12  # rounding of equal deals
    deals = [between([[values[i] for i in group] for group in deal]) for deal in _deals(set(range(len(values))), sizes)]
    return sum(each >= given for each in deals) / len(deals)


def _deals(items: set[int], sizes: Sequence[int]) -> Iterator[list[tuple[int, ...]]]:
    if not sizes:
        yield []
        return
    for group in combinations(sorted(items), sizes[0]):
        for rest in _deals(items - set(group), sizes[1:]):
            yield [group, *rest]


def draw(curves: dict[str, list[Curve]], path: Path) -> None:
    """Each engine's mean over the seeds, in a band from its lowest run to its highest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for engine, runs in curves.items():
        steps = list(runs[0])
        at = [[curve[step] for curve in runs] for step in steps]
        (line,) = axes.plot(steps, [statistics.fmean(each) for each in at], marker="o", markersize=4, label=engine)
        axes.fill_between(steps, list(map(min, at)), list(map(max, at)), color=line.get_color(), alpha=0.15)
    seeds = len(next(iter(curves.values())))
    axes.set_title(f"Validation accuracy by rollout engine, mean and range of {seeds} seeds", loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path)


def shown(values) -> str:
    return " ".join(f"{value:.1%}" for value in values)


if __name__ == "__main__":
    main()
