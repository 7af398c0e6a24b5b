"""The main job from nothing: problems and a random model, a supervised warm start, then PPO on the reward alone.

    python examples/demo/run.py [--seed 1] [--folder outputs/demo] [key=value ...]

Further ``key=value`` go to PPO. Each command is shown before it runs, to be copied and changed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
SFT_STEPS, PPO_STEPS = 900, 60


def sft_settings(folder: Path, seed: int) -> list[str]:
    return [
        f"data.train_files={folder}/data/sft_train.parquet",
        "data.train_batch_size=16",
        "data.max_length=64",
        f"model.path={folder}/random_model",
        "model.enable_gradient_checkpointing=False",
        "optim.lr=1e-3",
        "optim.lr_warmup_steps=20",
        "optim.lr_scheduler_type=cosine",
        "optim.min_lr_ratio=0.1",
        f"trainer.total_training_steps={SFT_STEPS}",
        f"trainer.seed={seed}",
        f"trainer.default_local_dir={folder}/sft",
    ]


def ppo_settings(folder: Path, seed: int) -> list[str]:
    return [
        f"data.train_files={folder}/data/train.parquet",
        f"data.val_files={folder}/data/test.parquet",
        "data.train_batch_size=64",
        "data.max_prompt_length=32",
        "data.max_response_length=32",
        f"actor_rollout_ref.model.path={folder}/sft/global_step_{SFT_STEPS}/huggingface",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        "actor_rollout_ref.rollout.name=hf",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.actor.ppo_mini_batch_size=16",
        "actor_rollout_ref.actor.optim.lr=3e-4",
        "actor_rollout_ref.actor.optim.lr_warmup_steps=5",
        "actor_rollout_ref.actor.optim.lr_scheduler_type=cosine",
        "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
        "critic.model.enable_gradient_checkpointing=False",
        "critic.optim.lr=1e-3",
        "critic.optim.lr_warmup_steps=5",
        "trainer.project_name=demo",
        f"trainer.total_training_steps={PPO_STEPS}",
        "trainer.test_freq=10",
        f"trainer.save_freq={PPO_STEPS}",
        f"trainer.seed={seed}",
        f"trainer.default_local_dir={folder}/ppo",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1, help="of the problems, the random model and all draws")
    parser.add_argument("--folder", type=Path, default=Path("outputs/demo"))
    parser.add_argument("settings", nargs="*", metavar="key=value", help="further settings of PPO")
    chosen = parser.parse_args()
    folder, seed = chosen.folder, chosen.seed
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the command, which stops cleanly and says how
    for part in ("data", "random_model", "sft", "ppo"):  # of an earlier demo in this folder
        shutil.rmtree(folder / part, ignore_errors=True)

    started = time.monotonic()
    for title, command in (
        ("Word problems", [HERE / "make_data.py", "--folder", folder / "data", "--seed", seed]),
        ("A model with random weights", [HERE / "make_model.py", "--folder", folder / "random_model", "--seed", seed]),
        ("Supervised training on worked examples", ["-m", "verl.trainer.main_sft", *sft_settings(folder, seed)]),
        ("PPO", ["-m", "verl.trainer.main_ppo", *ppo_settings(folder, seed), *chosen.settings]),
    ):
        if code := run(title, [str(part) for part in command]):
            return code
    run_folder = folder / "ppo"
    if not (run_folder / "metrics.jsonl").exists():  # the settings asked for a dry run, or for another folder
        return 0
    print(f"\n{outcome(run_folder)} The whole demo took {(time.monotonic() - started) / 60:.1f} minutes.")
    print(f"See README.md, curve.png and samples.md in {run_folder}.")
    for exported in run_folder.glob("global_step_*/actor/huggingface"):
        print(f"The model is in {exported}.")
    return 0


def run(title: str, arguments: list[str]) -> int:
    print(f"\n==== {title}\n$ python {shlex.join(arguments)}\n", flush=True)
    return subprocess.run([sys.executable, *arguments]).returncode


def outcome(folder: Path) -> str:
    """Accuracy on the test problems, answered greedily, at the first and the last validation."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    name = "val-core/verl/arithmetic/acc/mean@1"
    accuracies = [step[name] for step in steps if name in step]
    if len(accuracies) < 2:  # the settings asked for less validation
        return "PPO is done."
    return f"Test problems solved: {accuracies[0]:.1%} before PPO, {accuracies[-1]:.1%} after."


if __name__ == "__main__":
    sys.exit(main())
