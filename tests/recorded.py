"""``python tests/recorded.py record|replay FOLDER key=value ...``: the PPO command, its rollouts kept in a folder, or
taken from there instead of from an engine: two runs of other shapes then train on the same tokens."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pyarrow.parquet as pq

from verl.rollout.contract.base import Result
from verl.trainer.main_ppo import main
from verl.trainer.ppo import responder

FROM_ENGINE = (
    "response_ids",
    "response_mask",
    "rollout_log_probs",
    "finish_reason",
    "first_version",
    "last_version",
    "versions",
)

draw = responder.roll_out
numbers = itertools.count()


def file() -> Path:
    return folder / f"{next(numbers)}.parquet"


async def record(engine, episodes, sampling, on_finish=lambda index, result: None):
    table = await draw(engine, episodes, sampling, on_finish)
    pq.write_table(table, file())
    return table


async def replay(engine, episodes, sampling, on_finish=lambda index, result: None):
    recorded = pq.read_table(file())
    assert recorded["prompt_ids"].to_pylist() == episodes["prompt_ids"].to_pylist()
    for name in FROM_ENGINE:
        episodes = episodes.append_column(name, recorded[name].cast(recorded.schema.field(name).type))
    rows = zip(*(recorded[name].to_pylist() for name in ("uid", "response_ids", "rollout_log_probs")), strict=True)
    for index, row in enumerate(rows):
        on_finish(index, Result(*row, "stop"))
    return episodes


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    responder.roll_out = {"record": record, "replay": replay}[what]
    sys.exit(main(sys.argv[3:]))
