"""The reference of all keys: the page and --help."""

from pathlib import Path

import pytest

from verl.config import SFTConfig, load
from verl.config.loading.docs import config_page
from verl.config.loading.help import MODULES
from verl.config.loading.schema import keys_of

PAGE = Path(__file__).parents[2] / "docs" / "config.md"


def test_the_page_in_docs_is_current():
    assert PAGE.read_text() == config_page(), "run: make docs"


@pytest.mark.parametrize("schema", MODULES)
def test_every_key_has_a_meaning_that_fits_a_line(schema):
    for key, field in keys_of(schema).items():
        assert field.description, key
        assert field.description.endswith("."), key
        assert "\n" not in field.description, key


def test_help_shows_usage_and_the_required_keys(capsys):
    with pytest.raises(SystemExit) as stop:
        load(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "python3 -m verl.trainer.main_ppo" in text
    assert "actor_rollout_ref.model.path, actor_rollout_ref.rollout.name" in text


@pytest.mark.parametrize("schema", MODULES)
def test_every_entry_point_has_its_own_help(schema, capsys):
    with pytest.raises(SystemExit):
        load(["--help"], schema)
    assert f"python3 -m {MODULES[schema]} " in capsys.readouterr().out


def test_help_with_a_word_shows_the_keys_that_contain_it(capsys):
    with pytest.raises(SystemExit):
        load(["--help", "clip_ratio_low"])
    text = capsys.readouterr().out
    assert text.startswith("actor_rollout_ref.actor.clip_ratio_low=${actor_rollout_ref.actor.clip_ratio}\n")
    assert "number, at least 0, under 1" in text


def test_help_with_an_unknown_word_names_the_nearest_key(capsys):
    with pytest.raises(SystemExit):
        load(["--help", "train_batchsize"], SFTConfig)
    assert "data.train_batch_size" in capsys.readouterr().out
