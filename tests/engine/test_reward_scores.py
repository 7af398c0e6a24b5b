"""A sequence classifier's scores through the training engine: those of transformers, one sequence at a time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from engine_helpers import VOCAB, build, save_tiny_model
from forks import run_ranks

from verl.data.ragged import Ragged
from verl.engine.engine import OffloadedError
from verl.errors import UserError
from verl.plan import MicroBatching

LENGTHS = [5, 1, 17, 9, 2, 30, 9]


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def classifier(request, tmp_path_factory) -> str:
    return make_classifier(tmp_path_factory.mktemp(request.param), request.param)


def make_classifier(folder: Path, arch: str = "qwen2", labels: int = 1) -> str:
    base = save_tiny_model(folder / "base", arch)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    model.save_pretrained(folder / "classifier")
    return str(folder / "classifier")


def sequences() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, VOCAB, length).tolist() for length in LENGTHS]


def table_of(read: list[list[int]]) -> pa.Table:
    """As ``verl.reward.model_inputs`` gives it."""
    behind = Ragged.from_rows([[0]] * len(read), np.int32)
    return pa.table({"prompt_ids": Ragged.from_rows(read, np.int32).to_column(), "response_ids": behind.to_column()})


def expected(path: str) -> list[float]:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0, 0].item() for ids in sequences()]


def scores(engine, table: pa.Table, batching: MicroBatching) -> list[float]:
    return engine.values(table, batching=batching).flatten().to_pylist()


@pytest.mark.parametrize(("rows", "tokens"), [(1, None), (3, None), (None, 40), (None, None)])
def test_scores_are_transformers_own_for_any_micro_batches(classifier, rows, tokens):
    engine = build(classifier, "reward", trained=False)
    found = scores(engine, table_of(sequences()), MicroBatching(rows, tokens))
    assert found == pytest.approx(expected(classifier), rel=1e-5, abs=1e-5)
    assert len(set(found)) == len(LENGTHS)


def on_a_rank(rank, world_size, path, cuts):
    engine = build(path, "reward", trained=False)
    rows = table_of(sequences()).slice(cuts[rank], cuts[rank + 1] - cuts[rank])
    return scores(engine, rows, MicroBatching(2))


@pytest.mark.parametrize("cuts", [(0, 4, 7), (0, 7, 7)])
def test_scores_are_the_same_on_several_ranks_one_without_rows(classifier, cuts):
    found = run_ranks(2, on_a_rank, classifier, cuts)
    assert [score for of_rank in found for score in of_rank] == pytest.approx(expected(classifier), rel=1e-5, abs=1e-5)


def test_a_reward_model_can_wait_in_host_memory(classifier):
    engine = build(classifier, "reward", trained=False)
    engine.offload(params=True)
    with pytest.raises(OffloadedError):
        scores(engine, table_of(sequences()), MicroBatching())
    engine.onload(params=True)
    assert scores(engine, table_of(sequences()), MicroBatching()) == pytest.approx(
        expected(classifier), rel=1e-5, abs=1e-5
    )


def test_what_is_no_reward_model_is_refused(tmp_path, tiny):
    with pytest.raises(UserError, match="classifier has 3 labels"):
        build(make_classifier(tmp_path, labels=3), "reward", trained=False)
    config = Path(tiny) / "config.json"
    assert "id2label" not in json.loads(config.read_text())
    with pytest.raises(UserError, match="2 labels"):  # a language model: transformers' own default
        build(tiny, "reward", trained=False)
    with pytest.raises(UserError, match=r"lack score\.weight"):
        build(tiny, "reward", trained=False, override_config={"num_labels": 1})
