"""docs/metrics.md names every metric that a run reports, and none that no run reports."""

import re
from itertools import product
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import ROOT, arguments, make_model, metrics_of

from verl.rollout.weights.sender import PARTS
from verl.trainer.main_ppo import main
from verl.trainer.main_sft import main as sft
from verl.trainer.ppo.metrics import memory_metrics

PAGE = (ROOT / "docs" / "metrics.md").read_text()
ROWS = re.findall(r"^\| (`[^|]+`) \| ([^|]*(?:\\\|[^|]*)*) \|", PAGE.split("\n## Scores")[1], re.M)
KINDS = "actor|critic|global_seqlen|perf|prompt_length|response|response_length|reward|reward_model|timing_[a-z_]+"
LITERAL = re.compile(rf'(?<!_spread\()"((?:{KINDS}|train|training|val)/[\w./]+)"')  # a metric's name in the code
NOT_REPORTED = {"timing_s/log_prob_check"}  # before the first step, whose timer is a new one


def spelt_out(name: str) -> list[str]:
    """The patterns of a name on the page: {a,b} are two, {word} is any text."""
    parts = [part.split(",") for part in re.findall(r"\{([^}]*,[^}]*)\}", name)]
    form = re.sub(r"\{[^}]*,[^}]*\}", "\0", name)
    found = []
    for chosen in product(*parts):
        filled = form
        for part in chosen:
            filled = filled.replace("\0", part, 1)
        found.append(re.sub(r"\\\{\w+\\\}", ".+", re.escape(filled)))
    return found


PATTERNS = [pattern for names, _ in ROWS for name in re.findall(r"`([^`]+)`", names) for pattern in spelt_out(name)]


def on_page(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in PATTERNS)


def stages() -> set[str]:
    """The stages that the trainer times, by its source."""
    source = "".join(path.read_text() for path in sorted((ROOT / "verl/trainer/ppo").glob("*.py")))
    names = re.findall(r'\b(?:stage|timer|computing|forward)\(\s*(?:log, )?f?"([a-z_{}]+)"', source)
    roles = ("actor", "critic")
    return {f"timing_s/{name.format(role=role)}" for name in names for role in roles} - NOT_REPORTED


@pytest.fixture(scope="module")
def reported(small, tmp_path_factory) -> set[str]:
    """What small runs report that together switch everything on."""
    folder = tmp_path_factory.mktemp("metrics")
    (folder / "reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    odd = sum(map(ord, solution_str)) % 2\n"
        "    return {'score': float(odd), 'odd': odd, 'pred': solution_str[:1]}\n"
    )
    keys = {"custom_reward_function__path": folder / "reward.py", "trainer__total_training_steps": 1}
    loss, kl = "actor_rollout_ref__actor__policy_loss__loss_mode", "algorithm__kl_ctrl__kl_coef"
    runs = {
        "ppo": {
            kl: 0.01,
            "actor_rollout_ref__actor__entropy_coeff": 0.01,
            "actor_rollout_ref__rollout__val_kwargs__n": 4,
            "actor_rollout_ref__rollout__val_kwargs__do_sample": True,
            "actor_rollout_ref__rollout__val_kwargs__temperature": 1.0,
            "algorithm__rollout_correction__level": "token",
            "trainer__save_freq": 1,
        },
        "dapo": {
            "algorithm__adv_estimator": "grpo",
            "algorithm__filter_groups__enable": True,
            "algorithm__filter_groups__metric": "odd",
            "actor_rollout_ref__actor__use_kl_loss": True,
            "reward_model__overlong_buffer__enable": True,
            "reward_model__overlong_buffer__len": 6,
        },
        "remax": {"algorithm__adv_estimator": "remax", loss: "clip_cov"},
        "reward_model": {
            "reward_model__enable": True,
            "reward_model__model__path": reward_model(small, folder / "judge"),
            "reward_model__model__input_tokenizer": folder / "judge",
        },
    }
    found: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("verl.engine.engine.peak_flops", lambda device, dtype: 1e12)  # as of a GPU that is known
        patch.setattr("verl.memory.device_memory.Peak.bytes", 1 << 30)
        for name, more in runs.items():
            assert main(arguments(small, folder / name, **{**keys, **more})) == 0
            found |= {metric for step in metrics_of(folder / name) for metric in step}
        assert sft(sft_arguments(small, folder)) == 0
        found |= {metric for step in metrics_of(folder / "sft") for metric in step}
        for name, value in (("max_memory_allocated", 1), ("max_memory_reserved", 1), ("mem_get_info", (1, 2))):
            patch.setattr(f"torch.cuda.{name}", lambda device, value=value: value)
        found |= memory_metrics(torch.device("cuda")).keys()
    return found - {"step"}


def reward_model(small: Path, folder: Path) -> Path:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    make_model(folder / "base", seed=5)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1, pad_token_id=0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(small / "model").save_pretrained(folder)
    return folder


def sft_arguments(small: Path, folder: Path) -> list[str]:
    prompts = pq.read_table(small / "train.parquet")
    examples = prompts.append_column("response", pa.array(["abc"] * prompts.num_rows))
    pq.write_table(examples, folder / "examples.parquet")
    chosen = {
        "data.train_files": folder / "examples.parquet",
        "data.val_files": folder / "examples.parquet",
        "data.train_batch_size": 8,
        "data.max_length": 16,
        "model.path": small / "model",
        "trainer.total_training_steps": 1,
        "trainer.test_freq": 1,
        "trainer.default_local_dir": folder / "sft",
    }
    return [f"{name}={value}" for name, value in chosen.items()]


def test_every_metric_that_a_run_reports_is_on_the_page(reported):
    assert len(reported) > 130
    assert sorted(name for name in reported if not on_page(name)) == []


def test_every_metric_that_the_code_names_is_on_the_page():
    named = {name for file in (ROOT / "verl").rglob("*.py") for name in LITERAL.findall(file.read_text())}
    assert len(named) > 60
    assert sorted(name for name in named | stages() if not on_page(name)) == []


def test_the_page_names_no_metric_that_nothing_reports(reported):
    known = reported | stages() | {f"timing_part_s/update_weights/{part}" for part in (*PARTS, "model", "room", "load")}
    assert sorted(pattern for pattern in PATTERNS if not any(re.fullmatch(pattern, name) for name in known)) == []


def test_every_metric_on_the_page_has_a_meaning_and_none_comes_twice():
    assert all(len(meaning) >= 8 for _, meaning in ROWS)
    assert sorted({pattern for pattern in PATTERNS if PATTERNS.count(pattern) > 1}) == []
