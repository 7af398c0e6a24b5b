"""The report that a run leaves, made from the files of runs that were logged for real."""

import math
import random
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest

from verl.errors import UserError
from verl.tracking import build_trackers
from verl.tracking.picture import draw_curves, moving_average
from verl.tracking.report import read_metrics, samples_text, write_report


def ppo_metrics(step):
    noise = random.Random(step)
    accuracy = 0.4 + 0.5 * (1 - math.exp(-step / 20))
    metrics = {}
    if step:
        metrics |= {
            "critic/score/mean": accuracy + noise.gauss(0, 0.04),
            "response_length/mean": 24 + noise.random(),
            "actor/ppo_kl": 1e-3 * noise.random(),
            "actor/reward_kl_penalty": 5e-4 * step,
            "actor/entropy": math.exp(-step / 30),
            "critic/vf_explained_var": math.nan,
            "timing_s/gen": 1.0,
            "timing_s/update_actor": 0.5,
            "timing_s/step": 2.0,
        }
    if step % 10 == 0:
        metrics["val-core/openai/gsm8k/acc/mean@1"] = accuracy
    return metrics


def samples(step):
    return [
        {"input": f"What is {i} + {i}?", "output": f"#### {2 * i + (step == 0)}", "gts": str(2 * i), "score": step > 0}
        for i in range(40)
    ]


@pytest.fixture
def finished_run(make_run) -> Path:
    run = make_run(total_steps=40)
    with build_trackers(["file", "tensorboard"], run) as trackers:
        for step in range(41):
            trackers.log(ppo_metrics(step), step)
            if step % 10 == 0:
                trackers.dump(run.folder / "validation", step, samples(step))
    (run.folder / "config.yaml").write_text("trainer: {}\n")
    for name in ("global_step_9/actor", "global_step_40/actor", "global_step_40/critic"):
        (run.folder / name).mkdir(parents=True)
        architecture = "Qwen2ForCausalLM" if name.endswith("actor") else "Qwen2ForTokenClassification"
        (run.folder / name / "config.json").write_text(f'{{"architectures": ["{architecture}"]}}')
    return run.folder


def test_the_summary_tells_the_outcome_the_time_and_where_things_are(finished_run):
    readme = write_report(finished_run, title="GSM8K demo")
    text = readme.read_text()
    assert text.startswith("# GSM8K demo\n")
    assert "validation, openai/gsm8k: **0.400** at step 0, **0.832** at step 40" in text
    assert "time in steps: 0:01:20" in text
    assert [line for line in text.splitlines() if line.startswith("| ")] == [
        "| stage | total | a step | share |",
        "| gen | 0:00:40 | 1.00 s | 50.0% |",
        "| update_actor | 0:00:20 | 0.50 s | 25.0% |",
        "| step | 0:01:20 | 2.00 s | 100.0% |",
    ]
    model = finished_run / "global_step_40" / "actor"
    assert f"from_pretrained('{model}')" in text
    assert "global_step_9" not in text
    assert "TokenClassification" not in text
    assert "global_step_40/critic" not in text
    for name in ("curve.png", "samples.md", "config.yaml", "metrics.jsonl"):
        assert f"({name})" in text
        assert (finished_run / name).exists()


def test_the_picture_is_a_png_of_a_sensible_size_with_something_on_it(finished_run):
    write_report(finished_run)
    pixels = matplotlib.image.imread(finished_run / "curve.png")
    height, width = pixels.shape[:2]
    assert 800 <= width <= 2000
    assert 400 <= height <= 2000
    blue = (abs(pixels[..., :3] - [0x1F / 255, 0x77 / 255, 0xB4 / 255]) < 0.02).all(-1)
    top, bottom = blue[: height // 3], blue[height // 3 :]
    assert top.any(1).sum() > 50  # the validation curve climbs
    assert bottom.any()
    assert (finished_run / "curve.png").stat().st_size < 500_000


def test_the_same_prompts_answers_stand_beside_each_other(finished_run):
    write_report(finished_run)
    text = (finished_run / "samples.md").read_text()
    assert "8 of 40 prompts" in text
    for i in range(0, 40, 5):
        asked = text.index(f"What is {i} + {i}?")
        before, after = text.index(f"#### {2 * i + 1}\n", asked), text.index(f"#### {2 * i}\n", asked)
        assert asked < text.index("**Step 0**, score 0", asked) < before
        assert before < text.index("**Step 40**, score 1", asked) < after


def test_samples_may_hold_markdown_and_be_long():
    row = {"input": "p", "output": "````\n# not a heading\n" + "x" * 10_000, "gts": "1", "score": 0.5}
    text = samples_text([row], [row], "0", "5")
    assert "`````text\n````\n# not a heading" in text
    assert "more characters" in text
    assert len(text) < 6000


def test_dumps_of_an_earlier_run_in_the_folder_are_left_out(finished_run):
    from verl.tracking.dumps import dump_rows

    dump_rows(finished_run / "validation", 500, samples(500))
    dump_rows(finished_run / "validation", 7, samples(7))
    write_report(finished_run)
    assert (finished_run / "samples.md").read_text().startswith("# Samples at step 0 and step 40")


def test_supervised_training_has_its_own_panels(tmp_path):
    metrics = [{"step": step, "train/loss": 3 / (1 + step)} for step in range(30)]
    metrics += [{"step": 30, "val/loss": 0.2}]
    assert draw_curves(metrics, tmp_path / "curve.png", "sft")
    assert matplotlib.image.imread(tmp_path / "curve.png").shape[1] > 800


def test_a_run_of_one_step_or_none_is_reported_too(make_run):
    run = make_run()
    with build_trackers(["file"], run) as trackers:
        pass
    assert "no step was logged" in write_report(run.folder).read_text()
    assert not (run.folder / "curve.png").exists()
    with build_trackers(["file"], run) as trackers:
        trackers.log(ppo_metrics(10), 10)
    assert "**0.597** at step 10" in write_report(run.folder).read_text()
    assert (run.folder / "curve.png").exists()


def test_lines_of_one_step_are_put_together_and_null_is_nan(make_run):
    run = make_run()
    with build_trackers(["file"], run) as trackers:
        trackers.log({"a": 1.0, "b": math.nan}, 3)
        trackers.log({"c": 2.0}, 3)
    (metrics,) = read_metrics(run.folder / "metrics.jsonl")
    assert math.isnan(metrics.pop("b"))
    assert metrics == {"step": 3, "a": 1.0, "c": 2.0}


def test_the_report_can_be_written_again_by_hand(finished_run, repository, tmp_path):
    command = [sys.executable, "-m", "verl.tracking.report"]
    done = subprocess.run([*command, finished_run], cwd=repository, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(finished_run / "README.md")
    failed = subprocess.run([*command, tmp_path / "none"], cwd=repository, capture_output=True, text=True, timeout=60)
    assert failed.returncode == 1
    assert failed.stderr == (
        f"{tmp_path}/none/metrics.jsonl does not exist. "
        "The report needs the metrics that trainer.logger=[file] writes.\n"
    )
    assert not (tmp_path / "none").exists()


def test_a_report_that_cannot_be_written_says_so(finished_run):
    (finished_run / "README.md").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        write_report(finished_run)


def test_the_moving_average_is_the_mean_of_the_values_around():
    values = [random.Random(i).random() for i in range(100)]
    expected = [sum(part := values[max(0, i - 4) : i + 5]) / len(part) for i in range(100)]
    assert moving_average(values) == pytest.approx(expected)
    assert moving_average([1.0, 5.0]) == [1.0, 5.0]
