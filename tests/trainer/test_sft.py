"""Supervised fine-tuning through its command line, on a 2-layer Llama that learns to say words backwards."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from verl.errors import UserError
from verl.trainer.main_sft import main
from verl.trainer.sft.examples import fitted, load_examples

ROOT = Path(__file__).parents[2]
WORDS = ["<pad>", "<eos>", "<unk>", "<go>", *"abcdefgh"]


def make_model(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}<go>",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_examples(path: Path, count: int, seed: int) -> None:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        letters = draw.choices(WORDS[4:], k=draw.randint(1, 3))
        rows.append({"prompt": [{"role": "user", "content": " ".join(letters)}], "response": " ".join(letters[::-1])})
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    make_model(folder / "model")
    make_examples(folder / "train.parquet", 200, seed=0)
    return folder


def arguments(small: Path, run: Path, **keys: object) -> list[str]:
    """The small run's command line, keys replaced or added to (dots written as __)."""
    chosen = {
        "data.train_files": small / "train.parquet",
        "data.train_batch_size": 8,
        "data.max_length": 16,
        "model.path": small / "model",
        "optim.lr": 3e-3,
        "trainer.total_training_steps": 4,
        "trainer.default_local_dir": run,
        **{name.replace("__", "."): value for name, value in keys.items()},
    }
    return [f"{name}={value}" for name, value in chosen.items()]


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def repeatable(run: Path) -> list[dict[str, float]]:
    """Without what a clock has a say in."""
    return [
        {name: value for name, value in step.items() if not name.startswith(("timing_s/", "perf/throughput"))}
        for step in metrics_of(run)
    ]


def weights_of(run: Path, step: int) -> bytes:
    return (run / f"global_step_{step}" / "huggingface" / "model.safetensors").read_bytes()


def test_the_exported_model_gives_the_answers_it_was_taught(small, tmp_path):
    keys = {"trainer__total_training_steps": 150, "trainer__test_freq": 150, "data__train_batch_size": 32}
    assert main(arguments(small, tmp_path, data__val_files=small / "train.parquet", **keys)) == 0
    metrics = metrics_of(tmp_path)
    assert metrics[0]["step"] == 0
    assert metrics[0]["val/loss"] > 2.0
    assert metrics[-1]["val/loss"] < 0.2

    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported = tmp_path / "global_step_150" / "huggingface"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    right = 0
    for row in pq.read_table(small / "train.parquet").slice(0, 50).to_pylist():
        prompt = tokenizer(row["prompt"][0]["content"] + " <go>", return_tensors="pt")
        answer = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        right += tokenizer.decode(answer) == row["response"] + " <eos>"
    assert right >= 45


def test_the_loss_is_transformers_own_over_the_response_tokens(small, tmp_path):
    keys = {"data__shuffle": False, "trainer__total_training_steps": 1}
    assert main(arguments(small, tmp_path, **keys)) == 0

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(small / "model")
    tokenizer = AutoTokenizer.from_pretrained(small / "model")
    losses, tokens = 0.0, 0
    for row in pq.read_table(small / "train.parquet").slice(0, 8).to_pylist():
        prompt = tokenizer(row["prompt"][0]["content"] + " <go>")["input_ids"]
        response = [*tokenizer(row["response"])["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + response])
        with torch.no_grad():
            losses += model(input_ids=torch.tensor([prompt + response]), labels=labels).loss.item() * len(response)
        tokens += len(response)
    assert metrics_of(tmp_path)[0]["train/loss"] == pytest.approx(losses / tokens, rel=1e-5)


def test_a_run_and_its_repetition_are_equal_bit_for_bit(small, tmp_path):
    for run in ("one", "two"):
        assert main(arguments(small, tmp_path / run)) == 0
    assert repeatable(tmp_path / "one") == repeatable(tmp_path / "two")
    assert weights_of(tmp_path / "one", 4) == weights_of(tmp_path / "two", 4)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(small, tmp_path):
    keys = {"optim__lr_warmup_steps": 2, "data__train_batch_size": 64}
    assert main(arguments(small, tmp_path / "whole", trainer__total_training_steps=5, **keys)) == 0
    for steps in (2, 5):
        assert main(arguments(small, tmp_path / "parts", trainer__total_training_steps=steps, **keys)) == 0
    assert repeatable(tmp_path / "whole") == repeatable(tmp_path / "parts")
    assert weights_of(tmp_path / "whole", 5) == weights_of(tmp_path / "parts", 5)


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_do_not_change_what_is_learned(small, tmp_path, size):
    assert main(arguments(small, tmp_path / "whole")) == 0
    assert main(arguments(small, tmp_path / "cut", data__micro_batch_size_per_gpu=size)) == 0
    for one, other in zip(metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "cut"), strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-4)
        assert one["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=1e-4)


def test_epochs_decide_the_length_where_steps_do_not(small, tmp_path):
    keys = {"trainer__total_training_steps": "null", "trainer__total_epochs": 2, "data__train_batch_size": 90}
    assert main(arguments(small, tmp_path, **keys)) == 0
    assert [(step["step"], step["training/epoch"]) for step in metrics_of(tmp_path)] == [(1, 0), (2, 0), (3, 1), (4, 1)]


@pytest.mark.parametrize(
    ("side", "limit", "left"),
    [
        ("left", 6, ([2, 3], [4, 5, 6, 7])),
        ("left", 4, ([3], [4, 5, 6])),
        ("right", 6, ([1, 2, 3], [4, 5, 6])),
        ("right", 3, ([1, 2, 3], [])),
        ("right", 9, ([1, 2, 3], [4, 5, 6, 7])),
    ],
)
def test_a_long_example_is_cut_on_the_chosen_side(side, limit, left):
    assert fitted([1, 2, 3], [4, 5, 6, 7], limit, side) == left


def test_examples_over_the_limit_are_named_with_what_would_work(small, tmp_path, capsys):
    assert main(arguments(small, tmp_path, data__max_length=5)) == 1
    message = capsys.readouterr().err
    assert "are over data.max_length=5" in message
    assert "Set data.max_length=8" in message
    assert "Traceback" not in message


def test_examples_without_room_for_a_response_are_left_out_and_counted(small):
    from transformers import AutoTokenizer

    data = SimpleNamespace(
        prompt_key="prompt",
        response_key="response",
        max_length=4,
        truncation="right",
        apply_chat_template_kwargs={},
    )
    notices: list[str] = []
    tokenizer = AutoTokenizer.from_pretrained(small / "model")
    table = load_examples([str(small / "train.parquet")], tokenizer, data, kind="train", notice=notices.append)
    prompts = [row["prompt"][0]["content"] for row in pq.read_table(small / "train.parquet").to_pylist()]
    assert table.num_rows == sum(len(prompt.split()) < 3 for prompt in prompts)
    assert "have no room for a response and are left out" in notices[0]
    assert all(len(row["prompt_ids"]) + len(row["response_ids"]) <= 4 for row in table.to_pylist())


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "a b", "response": "b a"}, "not a list of chat messages"),
        ({"prompt": [{"role": "user", "content": "a"}], "response": None}, "not text"),
    ],
)
def test_a_row_that_is_no_example_is_named(small, tmp_path, row, complaint):
    from transformers import AutoTokenizer

    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "bad.parquet")
    data = SimpleNamespace(prompt_key="prompt", response_key="response")
    with pytest.raises(UserError, match=f"row 0: .*{complaint}"):
        load_examples(
            [str(tmp_path / "bad.parquet")],
            AutoTokenizer.from_pretrained(small / "model"),
            data,
            kind="train",
            notice=print,
        )


def test_all_problems_come_in_one_report_before_anything_starts(small, tmp_path, capsys):
    keys = {"optm__lr": 1, "data__response_key": "answer", "model__path": tmp_path / "nowhere", "trainer__logger": "x"}
    assert main(arguments(small, tmp_path / "run", **keys)) == 2
    report = capsys.readouterr().err
    for part in ("optm", "optim.lr", "'answer'", "nowhere", "trainer.logger"):
        assert part in report
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_named_is_one_problem_and_not_its_tokenizers_too(tmp_path, capsys):
    assert main([f"trainer.default_local_dir={tmp_path / 'run'}"]) == 2
    report = capsys.readouterr().err
    assert "model.path" in report
    assert "model.tokenizer_path=" not in report


@pytest.mark.parametrize("name", ["train", "val"])
def test_messages_in_parts_are_refused_before_anything_starts(small, tmp_path, capsys, name):
    parts = [{"type": "text", "text": "a b"}]
    rows = [{"prompt": [{"role": "user", "content": parts}], "response": "b a"}] * 8
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "parts.parquet")
    keys = {f"data__{name}_files": tmp_path / "parts.parquet"}
    assert main(arguments(small, tmp_path / "run", **keys)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"data.{name}_files={tmp_path}/parts.parquet" in said
    assert "the messages in its column 'prompt' are not text: their content is list<" in said
    assert not (tmp_path / "run").exists()


def test_examples_with_images_are_refused_unless_their_column_is_left_alone(small, tmp_path, capsys):
    rows = pq.read_table(small / "train.parquet")
    images = pa.array([[]] * 5 + [["a.png"]] * (rows.num_rows - 5), pa.list_(pa.string()))
    pq.write_table(rows.append_column("images", images), tmp_path / "images.parquet")
    keys = {"data__train_files": tmp_path / "images.parquet", "trainer__dry_run": True}
    assert main(arguments(small, tmp_path / "run", **keys)) != 0
    said = " ".join(capsys.readouterr().out.split())
    assert "its row 5 has images (column 'images'): models are trained on text alone" in said
    assert main(arguments(small, tmp_path / "run", **keys, data__image_key="null")) == 0
    assert main(arguments(small, tmp_path / "run", **keys, data__image_key="picture")) == 0
    assert "data.image_key has no effect: no data file has a column 'picture'" in capsys.readouterr().out


def test_a_dry_run_prints_the_plan_without_torch(small, tmp_path):
    code = "import sys; from verl.trainer.main_sft import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, *arguments(small, tmp_path / "run", trainer__dry_run=True)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert "optimizer steps   4" in found.stdout
    assert found.stdout.splitlines()[-1] == "0 False"
    assert not (tmp_path / "run").exists()


def test_keys_without_effect_are_named(small, tmp_path, capsys):
    keys = {"data__shuffle": False, "data__seed": 3, "optim__min_lr_ratio": 0.1, "fsdp_config__fsdp_size": 2}
    assert main(arguments(small, tmp_path, **keys, trainer__dry_run=True)) == 0
    said = capsys.readouterr().out
    named = re.findall(r"- ([\w.]+)=\S+ has no effect", said)
    assert sorted(named) == ["data.seed", "fsdp_config.fsdp_size", "optim.min_lr_ratio"]


def test_ctrl_c_stops_after_the_step_and_the_same_command_goes_on(small, tmp_path):
    keys = {"trainer__total_training_steps": 100_000, "trainer__save_freq": 50_000}
    command = [sys.executable, "-m", "verl.trainer.main_sft", *arguments(small, tmp_path, **keys)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 130
    assert "Traceback" not in output
    stopped = metrics_of(tmp_path)[-1]["step"]
    assert f"The same command goes on from step {stopped + 1}" in output
    assert main(arguments(small, tmp_path, trainer__total_training_steps=stopped + 1)) == 0
    assert metrics_of(tmp_path)[-1]["step"] == stopped + 1
