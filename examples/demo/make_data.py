"""Arithmetic word problems in the GSM8K schema: worked examples to imitate, questions to practise on, a test set.

    python examples/demo/make_data.py --folder outputs/demo/data --seed 1

writes three parquet files, whose rows look like those of examples/data_preprocess/gsm8k.py:
sft_train.parquet (columns ``prompt`` and ``response``), train.parquet and test.parquet (for main_ppo).
No question of the test set is in the other two, nor is its story with the same numbers under other names.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DATA_SOURCE = "verl/arithmetic"
NAMES = ("Ann", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kim", "Lena")
ITEMS = ("apples", "books", "cards", "coins", "marbles", "pears", "pencils", "shells", "stamps", "tickets")
GAINS = ("buys", "finds", "borrows", "wins")
LOSSES = ("loses", "sells", "lends", "drops")
# Whoever wrote the worked examples knows the first two verbs of each kind, and takes each of the others for the
# opposite kind this often: what those mean has to be learnt from the reward.
FAMILIAR, MISREAD = 2, 0.65
SPLIT_SIZES = {"test": 300, "sft_train": 4000, "train": 6000}


@dataclass(frozen=True)
class Problem:
    """numbers: (start, change, change ...), losses negative: the problem without its words. answer: worked steps, which
    are wrong where a verb was misread."""

    numbers: tuple[int, ...]
    question: str
    answer: str

    @property
    def ground_truth(self) -> str:
        return str(sum(self.numbers))


def draw_problem(random: np.random.Generator, misread: float = 0.0) -> Problem:
    """One or two changes to a number of things. misread: how often an unfamiliar verb's sign is wrong in the answer."""
    name, items = random.choice(NAMES), random.choice(ITEMS)
    start = written = int(random.integers(20, 60))
    numbers, events, steps = [start], [], []
    for _ in range(random.integers(1, 3)):
        change = int(random.integers(2, 10)) * int(random.choice([1, -1]))
        which = int(random.integers(len(GAINS)))
        numbers.append(change)
        events.append(f"{(GAINS if change > 0 else LOSSES)[which]} {abs(change)}")
        taken_for = -change if which >= FAMILIAR and random.random() < misread else change
        steps.append(f"{written}{taken_for:+}={written + taken_for}")
        written += taken_for
    told = f" and {events[0]}" if len(events) == 1 else f", {events[0]} and then {events[1]}"
    question = f"{name} has {start} {items}{told}. How many {items} does {name} have now?"
    return Problem(tuple(numbers), question, "\n".join([*steps, f"#### {written}"]))


def make_splits(seed: int, sizes: dict[str, int] = SPLIT_SIZES) -> dict[str, list[Problem]]:
    """No two test problems, and no test and training problem, have the same numbers."""
    random = np.random.default_rng(seed)
    splits: dict[str, list[Problem]] = {name: [] for name in sizes}
    tested: set[tuple[int, ...]] = set()
    for name, size in sizes.items():
        while len(splits[name]) < size:
            problem = draw_problem(random, MISREAD if name == "sft_train" else 0.0)
            if problem.numbers not in tested:
                splits[name].append(problem)
                if name == "test":
                    tested.add(problem.numbers)
    return splits


def messages(problem: Problem) -> list[dict[str, str]]:
    return [{"role": "user", "content": problem.question}]


def prompt_rows(problems: list[Problem], split: str) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "data_source": DATA_SOURCE,
                "prompt": messages(problem),
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": problem.ground_truth},
                "extra_info": {
                    "split": split,
                    "index": index,
                    "question": problem.question,
                    "answer": problem.answer,
                },
            }
            for index, problem in enumerate(problems)
        ]
    )


def worked_rows(problems: list[Problem]) -> pa.Table:
    return pa.Table.from_pylist([{"prompt": messages(problem), "response": problem.answer} for problem in problems])


def write_data(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, problems in make_splits(seed).items():
        table = worked_rows(problems) if split == "sft_train" else prompt_rows(problems, split)
        pq.write_table(table, folder / f"{split}.parquet")
        print(f"{folder / split}.parquet: {table.num_rows} rows, e.g. {problems[0].question}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    write_data(arguments.folder, arguments.seed)
