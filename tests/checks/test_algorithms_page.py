"""docs/algorithms.md: a row for each algorithm, keys that exist, and an example that runs."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from verl.algorithms.advantages import ESTIMATORS, AdvantageInputs, resolve
from verl.algorithms.loss_modes import LOSS_MODES
from verl.algorithms.loss_modes import resolve as resolve_loss
from verl.algorithms.losses import AGGREGATION_MODES
from verl.algorithms.policy_losses import PolicyTokens
from verl.config.loading.load import load
from verl.config.loading.schema import keys_of, sections_of
from verl.config.sections.models import ActorConfig, Config
from verl.data.ragged import Ragged

PAGE = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
RECIPES = re.findall(r"^\| [^|]+ \| `(algorithm\.[^`]+)` \|$", PAGE, re.M)
DAPO = re.search(r"```bash\n(.*?)```", PAGE, re.S)[1].replace("\\\n", " ")


def rows_under(title: str) -> list[str]:
    section = PAGE.split(f"## {title}")[1].split("\n## ")[0]
    return re.findall(r"^\| `([\w-]+)` \|", section, re.M)


def test_every_algorithm_has_its_row():
    assert rows_under("Advantages") == list(ESTIMATORS)
    assert sorted(rows_under("Policy losses")) == sorted(LOSS_MODES)
    assert sorted(rows_under("Averages")) == sorted(AGGREGATION_MODES)


def test_every_key_on_the_page_exists():
    known = {*keys_of(Config), *sections_of(Config)}
    named = re.findall(r"\b((?:actor_rollout_ref|algorithm|critic|data|reward_model|trainer)\.[a-z_.]+[a-z_])\b", PAGE)
    assert len(named) > 30
    assert {key for key in named if key not in known} == set()


@pytest.mark.parametrize("recipe", [*RECIPES, DAPO])
def test_every_recipe_is_a_configuration(recipe):
    needed = ["actor_rollout_ref.model.path=some/model", "actor_rollout_ref.rollout.name=hf"]
    assert load([*recipe.split(), *needed]).config is not None


def test_the_example_of_ones_own_functions_runs(tmp_path, monkeypatch):
    (tmp_path / "my_algorithms.py").write_text(re.search(r"```python\n(.*?)```", PAGE, re.S)[1])
    monkeypatch.syspath_prepend(tmp_path)
    mask = Ragged.from_rows([[1, 1], [1, 0], [1]], np.int8)
    rewards = mask.like(np.array([0.0, 1.0, 0.0, 0.0, 2.0], np.float32))
    inputs = AdvantageInputs(rewards, None, mask, np.array([0, 0, 1]), SimpleNamespace())
    advantages, _ = resolve("my_algorithms:sign_of_advantage")(inputs)
    assert advantages.values.tolist() == [1, 1, -1, 0, 0]

    log_probs = torch.tensor([0.0, 0.5], requires_grad=True)
    columns = {"response_mask": torch.ones(2), "old_log_probs": torch.zeros(2), "advantages": torch.ones(2)}
    tokens = PolicyTokens.of({"log_probs": log_probs}, columns)
    losses, shares = resolve_loss("my_algorithms:squared_ratio").load()(tokens, ActorConfig(clip_ratio_high=0.2))
    losses.sum().backward()
    assert shares["actor/far"].tolist() == [False, True]
    assert log_probs.grad.isfinite().all()
