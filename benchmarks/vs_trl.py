"""A GRPO step of the demo's model here and in TRL's GRPOTrainer with plain transformers generation.

    make demo
    python3 -m venv .venv-trl
    .venv-trl/bin/pip install torch==2.13.0
    .venv-trl/bin/pip install -c constraints-cpu.txt trl==1.16.0
    .venv-trl/bin/pip install -c constraints-cpu.txt --no-deps -e .
    python benchmarks/vs_trl.py --trl-python .venv-trl/bin/python [--rounds 5] [--steps 12] [--curve 40]

Both begin from the demo's warm start, on its problems: 64 prompts a step, 4 responses each, 4 optimizer steps of 16
prompts, the same loss (clipped, token mean, no KL), AdamW, float32, no recomputation, two threads. Each round is a
process of each in turn, so that other load on the machine meets both; a step's time is without validation, saving and
start. CPU seconds, of all threads of the process, are what load changes least. Tokens: of prompts and responses,
padding not counted. Medians over all rounds' steps but the first two of each; the range is of the rounds' medians. Peak
memory is the process's, and what it grew by after the first step began. equal: every response has 32 tokens. ragged:
they end where the model ends them, at 96 tokens at most.

--curve: share of the test problems solved greedily, before and after so many steps, with a constant learning rate.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPTS, RESPONSES, UPDATES, LEARNING_RATE = 64, 4, 4, 3e-4
LONGEST = {"equal": 32, "ragged": 96}
WARM_UP = 2  # steps of each process that do not count
CURVE_EVERY = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("outputs/demo"), help="folder that make demo wrote")
    parser.add_argument("--trl-python", type=Path, help="python of the environment that has TRL")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="of each process")
    parser.add_argument("--curve", type=int, default=0, help="steps of the learning curve; 0: none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", nargs=3, metavar=("SYSTEM", "LENGTHS", "STEPS"), help=argparse.SUPPRESS)
    parser.add_argument("--validate", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        system, lengths, steps = chosen.one
        run = run_ours if system == "ours" else run_trl
        print("RESULT " + json.dumps(run(chosen.demo, lengths, int(steps), chosen.validate)))
        return
    if chosen.trl_python is None:
        parser.error("--trl-python is needed")
    for lengths in LONGEST:
        compare(chosen, lengths)
    if chosen.curve:
        for system in ("ours", "trl"):
            found = in_a_process(chosen, system, "ragged", chosen.curve, validate=True)
            points = [f"{step}: {share:.1%}" for step, share in found["solved"]]
            print(f"{system}: test problems solved at steps {', '.join(points)}")


def compare(chosen: argparse.Namespace, lengths: str) -> None:
    found: dict[str, list[dict]] = {"ours": [], "trl": []}
    for _ in range(chosen.rounds):
        for system, runs in found.items():
            runs.append(in_a_process(chosen, system, lengths, chosen.steps))
    rates: dict[str, list[float]] = {}
    for system, runs in found.items():
        cells, rates[system] = [], []
        for clock in ("seconds", "cpu_seconds"):
            of_runs = [
                [tokens / used for tokens, used in zip(r["tokens"], r[clock], strict=True)][WARM_UP:] for r in runs
            ]
            medians = [statistics.median(each) for each in of_runs]
            rates[system].append(statistics.median(rate for each in of_runs for rate in each))
            cells.append(f"{rates[system][-1]:8,.0f} tokens/{clock} ({min(medians):,.0f} to {max(medians):,.0f})")
        cells.append(f"{statistics.median(tokens for each in runs for tokens in each['tokens']):,.0f} tokens a step")
        cells.append(f"peak {max(each['peak'] for each in runs) / 1e6:,.0f} MB")
        cells.append(f"grown by {statistics.median(each['grown'] for each in runs) / 1e6:,.0f} MB")
        print(f"{lengths:7} {system:5} {', '.join(cells)}", flush=True)
    by_wall, by_cpu = (ours / theirs for ours, theirs in zip(rates["ours"], rates["trl"], strict=True))
    print(f"{lengths:7} ratio {by_wall:.2f}, of CPU seconds {by_cpu:.2f}; load {os.getloadavg()[0]:.1f}", flush=True)


def in_a_process(chosen: argparse.Namespace, system: str, lengths: str, steps: int, validate: bool = False) -> dict:
    python = sys.executable if system == "ours" else str(chosen.trl_python)
    command = [python, __file__, "--demo", str(chosen.demo), "--one", system, lengths, str(steps)]
    threads = {"OMP_NUM_THREADS": str(chosen.threads), "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **threads, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--validate"] if validate else command, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{system} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def warm_start(demo: Path) -> Path:
    return next(demo.glob("sft/global_step_*/huggingface"))


class Clock:
    """Of steps, and of the process's memory around them."""

    def __init__(self) -> None:
        self.seconds, self.cpu_seconds, self.before = list[float](), list[float](), 0

    def start(self) -> None:
        self.before = self.before or memory()
        self._started = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.seconds.append(time.perf_counter() - self._started[0])
        self.cpu_seconds.append(time.process_time() - self._started[1])

    def found(self) -> dict:
        peak = memory()
        grown = peak - self.before
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "peak": peak, "grown": grown}


def memory() -> int:
    """The most that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- ours


def run_ours(demo: Path, lengths: str, steps: int, validate: bool) -> dict:
    """seconds, cpu_seconds, tokens: of each step; solved: (step, share of the test problems)."""
    from verl.trainer.main_ppo import main as train
    from verl.trainer.ppo.trainer import PPOTrainer

    clock, train_step = Clock(), PPOTrainer.train_step

    def timed(self, log):
        clock.start()
        table = train_step(self, log)
        clock.stop()
        return table

    PPOTrainer.train_step = timed
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "data.train_files": demo / "data/train.parquet",
            "data.val_files": demo / "data/test.parquet",
            "data.train_batch_size": PROMPTS,
            "data.max_prompt_length": 32,
            "data.max_response_length": LONGEST[lengths],
            "actor_rollout_ref.model.path": warm_start(demo),
            "actor_rollout_ref.model.enable_gradient_checkpointing": False,
            "actor_rollout_ref.rollout.name": "hf",
            "actor_rollout_ref.rollout.n": RESPONSES,
            "actor_rollout_ref.rollout.ignore_eos": lengths == "equal",
            "actor_rollout_ref.actor.ppo_mini_batch_size": PROMPTS // UPDATES,
            "actor_rollout_ref.actor.optim.lr": LEARNING_RATE,
            "algorithm.adv_estimator": "grpo",
            "trainer.check_log_probs": False,
            "trainer.val_before_train": validate,
            "trainer.test_freq": CURVE_EVERY if validate else -1,
            "trainer.total_training_steps": steps,
            "trainer.default_local_dir": folder,
        }
        if train([f"{key}={value}" for key, value in settings.items()]):
            sys.exit("the run failed")
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    name = "val-core/verl/arithmetic/acc/mean@1"
    return {
        **clock.found(),
        "tokens": [line["perf/total_num_tokens"] for line in lines if line["step"]],
        "solved": [(line["step"], line[name]) for line in lines if name in line],
    }


# ---- TRL


def run_trl(demo: Path, lengths: str, steps: int, validate: bool) -> dict:
    """As ``run_ours``. A step is the four optimizer steps on what was generated together."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from verl.reward.gsm8k import compute_score

    tokenizer = AutoTokenizer.from_pretrained(warm_start(demo))
    model = AutoModelForCausalLM.from_pretrained(warm_start(demo))

    def with_truth(row: dict) -> dict:
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        return {"ground_truth": row["reward_model"]["ground_truth"], "prompt_tokens": len(ids)}

    files = {split: str(demo / f"data/{split}.parquet") for split in ("train", "test")}
    data = (
        load_dataset("parquet", data_files=files)
        .map(with_truth)
        .select_columns(["prompt", "ground_truth", "prompt_tokens"])
    )
    tokens: list[int] = []  # of each step

    def reward(completions, completion_ids, ground_truth, prompt_tokens, **_):
        tokens.append(sum(map(len, completion_ids)) + sum(prompt_tokens))
        texts = [completion[0]["content"] for completion in completions]
        return [compute_score("", *pair, {})["score"] for pair in zip(texts, ground_truth, strict=True)]

    def solved() -> float:
        """Greedily, by transformers."""
        right, rows = 0, data["test"].to_list()
        texts = [tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True, tokenize=False) for r in rows]
        batch = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
        answers = model.generate(**batch, do_sample=False, max_new_tokens=32)[:, batch["input_ids"].shape[1] :]
        for text, row in zip(tokenizer.batch_decode(answers, skip_special_tokens=True), rows, strict=True):
            right += compute_score("", text, row["ground_truth"], {})["acc"]
        return right / len(rows)

    clock = Clock()
    curve: list[tuple[int, float]] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step % UPDATES == 0:
                clock.start()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % UPDATES == 0:
                clock.stop()
                if validate and len(clock.seconds) % CURVE_EVERY == 0:
                    curve.append((len(clock.seconds), solved()))

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model,
            reward_funcs=reward,
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                per_device_train_batch_size=PROMPTS * RESPONSES // UPDATES,
                steps_per_generation=UPDATES,
                gradient_accumulation_steps=1,
                num_generations=RESPONSES,
                num_iterations=1,
                max_completion_length=LONGEST[lengths],
                generation_kwargs={"min_new_tokens": LONGEST[lengths]} if lengths == "equal" else None,
                temperature=1.0,
                beta=0.0,
                loss_type="bnpo",
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                weight_decay=0.01,
                max_grad_norm=1.0,
                max_steps=steps * UPDATES,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=1,
            ),
            train_dataset=data["train"],
            processing_class=tokenizer,
            callbacks=[Watch()],
        )
        if validate:
            curve.append((0, solved()))
        trainer.train()
    return {**clock.found(), "tokens": tokens, "solved": curve}


if __name__ == "__main__":
    main()
