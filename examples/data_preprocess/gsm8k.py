"""GSM8K as parquet files for training: {local_dir}/train.parquet and test.parquet.

From the hub's openai/gsm8k, or from a folder with train.jsonl and test.jsonl, whose lines hold "question" and "answer".
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from verl.errors import UserError
from verl.reward.gsm8k import canonical

DATA_SOURCE = "openai/gsm8k"
# Chosen among 13 wordings for Qwen2.5-Coder-0.5B-Instruct: 45 % of its samples hold an answer in this form, and 5 % the
# right one. Without an example line, or with one but no word on what it stands for, none or hardly any do.
INSTRUCTION = (
    'Reason step by step and compute the answer. Then write "#### " and the number that you computed as the last line. '
    "(Example of such a line, for an answer of 42: #### 42)"
)
SPLITS = ("train", "test")

Example = tuple[str, dict]  # where it comes from, for errors; question and answer


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_dir", default="~/data/gsm8k", help="where to write (default: %(default)s)")
    parser.add_argument("--local_dataset_path", help="folder with train.jsonl and test.jsonl, instead of the hub")
    parser.add_argument("--instruction", default=INSTRUCTION, help="text after each question (default: %(default)r)")
    arguments = parser.parse_args(argv)
    try:
        folder = Path(arguments.local_dir).expanduser()
        tables = {}
        for split in SPLITS:
            source = arguments.local_dataset_path
            examples = from_jsonl(Path(source).expanduser() / f"{split}.jsonl") if source else from_hub(split)
            tables[split] = pa.Table.from_pylist(
                [make_row(split, index, arguments.instruction, *each) for index, each in enumerate(examples)]
            )
        for split, table in tables.items():
            path = write(table, folder / f"{split}.parquet")
            print(f"{path}: {table.num_rows} rows")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def make_row(split: str, index: int, instruction: str, where: str, example: dict) -> dict:
    if missing := [key for key in ("question", "answer") if not isinstance(example.get(key), str)]:
        raise UserError(f"{where}: no text under {' and '.join(missing)}; its keys are {', '.join(example) or 'none'}")
    question, answer = example["question"], example["answer"]
    _, marker, last = answer.rpartition("####")
    solution = last.strip().replace(",", "")
    if not marker or canonical(solution) is None:
        raise UserError(f'{where}: the answer does not end with "#### NUMBER": {answer[-60:]!r}')
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": f"{question} {instruction}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": solution},
        "extra_info": {"split": split, "index": index, "answer": answer, "question": question},
    }


def from_jsonl(path: Path) -> Iterator[Example]:
    try:
        file = path.open(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--local_dataset_path: cannot read {path} ({error.strerror})") from error
    with file:
        count = 0
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                example = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(example, dict):
                raise UserError(f"{path}, line {number} is not a JSON object: {line.strip()[:60]}")
            count += 1
            yield f"{path}, line {number}", example
    if count == 0:
        raise UserError(f"{path} has no rows")


def from_hub(split: str) -> Iterable[Example]:
    instead = "or give --local_dataset_path a folder with train.jsonl and test.jsonl"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(
            f'reading {DATA_SOURCE} from the hub needs a package: pip install -e ".[data]", {instead}'
        ) from error
    try:
        rows = load_dataset(DATA_SOURCE, "main", split=split)
    except Exception as error:  # the hub's client raises many kinds when it is out of reach
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot get {DATA_SOURCE} from the hub ({reason}): check the network, {instead}") from error
    return ((f"{DATA_SOURCE} {split}, row {index}", row) for index, row in enumerate(rows))


def write(table: pa.Table, path: Path) -> Path:
    """The whole file or none: under a temporary name first."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, partial)
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return path


if __name__ == "__main__":
    sys.exit(main())
