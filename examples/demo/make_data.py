"""Arithmetic word problems in the GSM8K schema: worked examples to imitate, questions to practise on, a test set.

    python examples/demo/make_data.py --folder outputs/demo/data --seed 1

writes three parquet files, whose rows look like those of examples/data_preprocess/gsm8k.py:
sft_train.parquet (columns ``prompt`` and ``response``), train.parquet and test.parquet (for main_ppo).
No question of the test set is in the other two, nor is its story with the same numbers under other names.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DATA_SOURCE = "verl/arithmetic"
NAMES = ("Ann", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kim", "Lena")
ITEMS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pears", "pencils", "shells", "stamps")
SPLIT_SIZES = {"sft_train": 2000, "train": 6000, "test": 300}


@dataclass(frozen=True)
class Problem:
    """key: the story and its numbers, the same for every choice of names and items. answer ends in ``#### number``."""

    key: tuple
    question: str
    answer: str

    @property
    def ground_truth(self) -> str:
        return self.answer.rsplit("#### ", 1)[1]


class Draw:
    """A problem's numbers, names and items, drawn from one random stream."""

    def __init__(self, random: np.random.Generator):
        self.random = random
        self.name, self.other = random.choice(NAMES, size=2, replace=False)
        self.items = random.choice(ITEMS)

    def number(self, low: int, high: int) -> int:
        """low and high included."""
        return int(self.random.integers(low, high + 1))


Story = Callable[[Draw], tuple[tuple[int, ...], str, list[str], int]]


SMALL = 20


def get_more(d: Draw):
    a, b = d.number(10, 99), d.number(2, SMALL)
    question = f"{d.name} has {a} {d.items} and buys {b} more. How many {d.items} does {d.name} have now?"
    return (a, b), question, [f"{a} + {b} = {a + b}"], a + b


def give_away(d: Draw):
    a = d.number(21, 99)
    b = d.number(2, SMALL)
    question = f"{d.name} has {a} {d.items} and gives {b} to {d.other}. How many {d.items} are left?"
    return (a, b), question, [f"{a} - {b} = {a - b}"], a - b


def two_gifts(d: Draw):
    a, b, c = d.number(10, 99), d.number(2, SMALL), d.number(2, SMALL)
    question = f"{d.name} has {a} {d.items}, gets {b} and then finds {c}. How many {d.items} does {d.name} have now?"
    return (a, b, c), question, [f"{a} + {b} = {a + b}", f"{a + b} + {c} = {a + b + c}"], a + b + c


def find_and_lose(d: Draw):
    a, b, c = d.number(21, 99), d.number(2, SMALL), d.number(2, SMALL)
    question = f"{d.name} has {a} {d.items}, finds {b} and then loses {c}. How many {d.items} does {d.name} have now?"
    return (a, b, c), question, [f"{a} + {b} = {a + b}", f"{a + b} - {c} = {a + b - c}"], a + b - c


def boxes(d: Draw):
    a, b, c = d.number(2, 9), d.number(2, 9), d.number(2, SMALL)
    question = f"{d.name} buys {a} boxes of {b} {d.items} and has {c} {d.items} at home. How many is that together?"
    return (a, b, c), question, [f"{a} * {b} = {a * b}", f"{a * b} + {c} = {a * b + c}"], a * b + c


STORIES: tuple[Story, ...] = (get_more, give_away, two_gifts, find_and_lose, boxes)


def draw_problem(random: np.random.Generator) -> Problem:
    story = STORIES[random.integers(len(STORIES))]
    draw = Draw(random)
    numbers, question, steps, result = story(draw)
    answer = ". ".join(steps) + f" {draw.items}.\n#### {result}"
    return Problem((story.__name__, *numbers), question, answer)


def make_splits(seed: int, sizes: dict[str, int] = SPLIT_SIZES) -> dict[str, list[Problem]]:
    """Disjoint by story and numbers: whoever knows all of one split has seen no problem of another."""
    random = np.random.default_rng(seed)
    problems: dict[tuple, Problem] = {}
    while len(problems) < sum(sizes.values()):
        problem = draw_problem(random)
        problems.setdefault(problem.key, problem)
    rest = iter(problems.values())
    return {name: [next(rest) for _ in range(size)] for name, size in sizes.items()}


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
