"""What the console shows: rows that line up, plain lines where there is no terminal, bars where there is one."""

import io
import os
import pty
import re
import select
import subprocess
import sys
import termios

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from verl.tracking.columns import Rows, duration_text, number_text, validation_means
from verl.tracking.progress import QUIET_SECONDS, Progress

METRICS = {
    "critic/score/mean": 0.512,
    "response_length/mean": 231.4,
    "response_length/clip_ratio": 0.031,
    "actor/reward_kl_penalty": 1.3e-4,
    "actor/ppo_kl": 2.1e-5,
    "actor/entropy": 0.71,
    "actor/grad_norm": 1.25,
    "critic/grad_norm": 11.5,
    "critic/vf_explained_var": 0.4,
    "perf/throughput": 4711.0,
    "timing_s/step": 2.31,
}


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def plain_progress(run, clock=None, **options):
    out = io.StringIO()
    console = Console(file=out, highlight=False, emoji=False, **options)
    return Progress(run, console=console, **({"clock": clock} if clock else {})), out


def test_a_row_shows_each_metric_under_its_title():
    (header, _), (row, _) = Rows(100).lines(7, METRICS, left=3725, width=None)
    assert dict(zip(re.split(r"\s{2,}", header.strip()), row.split(), strict=True)) == {
        "step": "7/100",
        "score": "0.512",
        "length": "231",
        "clipped": "3.1%",
        "KL ref": "0.00013",
        "KL step": "2.1e-05",
        "entropy": "0.710",
        "grad": "1.25",
        "critic grad": "11.5",
        "explained": "0.40",
        "tok/s/dev": "4,711",
        "seconds": "2.31",
        "left": "1:02:05",
    }


def test_rows_line_up_whatever_the_numbers():
    rows = Rows(100)
    first = rows.lines(1, METRICS, left=60, width=None)
    for step, factor in enumerate([1e-12, 1e9, -1e12, float("nan"), float("-inf")], 2):
        wild = {name: value * factor for name, value in METRICS.items()}
        ((row, _),) = rows.lines(step, wild, left=60, width=None)
        assert len(row) == len(first[0][0]) == len(first[1][0])


@given(st.floats(allow_nan=True), st.sampled_from([".3f", ",.0f", ".2g", ".1%"]), st.integers(7, 12))
def test_a_number_fits_its_column_and_stays_the_same_number(value, spec, width):
    text = number_text(value, spec, width)
    assert len(text) <= width
    if 1e6 < abs(value) < 1e300:
        read = float(text.replace(",", "").rstrip("%")) / (100 if text.endswith("%") else 1)
        assert read == pytest.approx(value, rel=0.5)


def test_the_header_comes_again_now_and_then_and_when_a_column_appears():
    rows = Rows(200)
    lengths = [len(rows.lines(step, METRICS, left=1, width=None)) for step in range(1, 61)]
    assert [step for step, length in enumerate(lengths, 1) if length == 2] == [1, 26, 51]
    validated = METRICS | {"val-core/openai/gsm8k/acc/mean@1": 0.25}
    (header, style), (row, _) = rows.lines(61, validated, left=1, width=None)
    assert style == "bold"
    assert "valid" in header
    assert "0.250" in row


def test_validation_on_several_sources_names_each():
    metrics = {"val-core/openai/gsm8k/acc/mean@4": 0.25, "val-core/math/reward/mean@4": 0.75}
    metrics |= {"val-core/openai/gsm8k/acc/best@4": 0.9, "val-aux/math/acc/mean@4": 0.1}
    assert validation_means(metrics) == {"openai/gsm8k": 0.25, "math": 0.75}
    _, (row, _), (sources, _) = Rows(10).lines(0, metrics, left=None, width=None)
    assert row.split() == ["0/10", "0.500"]
    assert sources.strip() == "validation: openai/gsm8k 0.250, math 0.750"


@pytest.mark.parametrize("width", [1, 10, 30, 60, 80, 100, 200])
def test_rows_keep_what_matters_most_within_the_width_of_the_console(width):
    (header, _), (row, _) = Rows(100).lines(7, METRICS, left=3725, width=width)
    assert row.strip().startswith("7/100")
    assert len(row) <= max(width, 7)
    if width >= 30:
        assert "score" in header
        assert "left" in header


def test_a_step_with_nothing_to_show_has_no_row():
    assert Rows(10).lines(3, {"timing_s/save_checkpoint": 2.0}, left=1, width=None) == []


def test_durations_read_as_hours_minutes_and_seconds():
    assert [duration_text(seconds) for seconds in (0, 59.6, 3599, 86399, 90061)] == [
        "0:00:00",
        "0:01:00",
        "0:59:59",
        "23:59:59",
        "1d 1:01:01",
    ]


def test_where_there_is_no_terminal_lines_are_plain(make_run, monkeypatch):
    for variable in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(variable, raising=False)
    progress, out = plain_progress(make_run(folder="checkpoints/gsm8k/demo"))
    with progress:
        for step in range(1, 21):
            with progress.stage("rollout", 64) as stage:
                for _ in range(64):
                    stage.advance(tokens=100)
            progress.step(step, METRICS)
        progress.note("sample: \x1b[31mred\x1b[0m\r")
        progress.warn("disk nearly full")
    lines = out.getvalue().splitlines()
    assert lines[0] == "gsm8k/demo: steps 1 to 20, in checkpoints/gsm8k/demo"
    assert len(lines) == 1 + 1 + 20 + 2  # the start, a header, a line a step, two messages
    assert lines[-1] == "warning: disk nearly full"
    assert all(character.isprintable() or character == "\n" for character in out.getvalue())
    assert len({len(line) for line in lines[1:22]}) == 1


def test_a_long_stage_says_where_it_is_now_and_then(make_run):
    clock = Clock()
    progress, out = plain_progress(make_run(), clock)
    with progress:
        before = len(out.getvalue().splitlines())
        with progress.stage("rollout", 128) as stage:
            for _ in range(128):
                clock.now += QUIET_SECONDS / 32
                stage.advance(tokens=1000)
        with progress.stage("update_actor"):
            clock.now += 1000
    lines = out.getvalue().splitlines()[before:]
    assert len(lines) == 4
    assert lines[0].startswith("step 1/20, rollout 32/128, ")
    assert "1,067 tokens/s, 0:00:30" in lines[0]


def test_time_left_follows_the_last_steps(make_run):
    clock = Clock()
    progress, out = plain_progress(make_run(total_steps=100), clock)
    with progress:
        for step in range(1, 31):
            clock.now += 100 if step <= 10 else 2
            progress.step(step, METRICS)
    row = out.getvalue().splitlines()[-1]
    assert row.endswith(duration_text(2 * 70))  # the slow ones are forgotten


def test_time_left_leaves_out_the_first_step_and_compilation(make_run):
    clock = Clock()
    progress, out = plain_progress(make_run(total_steps=12), clock)
    with progress:
        clock.now += 50  # the engine starts
        for seconds, compiling in ((30, 20), (10, 0), (30, 20)):
            clock.now += seconds
            times = {"timing_s/step": seconds, "perf/compile_seconds": compiling}
            progress.step(progress._pace.step + 1, {**METRICS, **times})
    rows = [line.split()[-1] for line in out.getvalue().splitlines()[-3:]]
    assert rows == [duration_text(each) for each in (30 * 11, 10 * 10, 10 * 9)]


def test_a_resumed_run_counts_on_from_its_step(make_run):
    clock = Clock()
    progress, out = plain_progress(make_run(resume_step=15), clock)
    with progress:
        clock.now += 10
        progress.step(16, {**METRICS, "timing_s/step": 10.0})
    assert "steps 16 to 20" in out.getvalue()
    assert out.getvalue().splitlines()[-1].endswith(duration_text(10 * 4))


def test_without_the_console_logger_only_messages_are_shown(make_run):
    out = io.StringIO()
    progress = Progress(make_run(), show=False, console=Console(file=out))
    with progress:
        with progress.stage("rollout", 1) as stage:
            stage.advance()
        progress.step(1, METRICS)
        progress.warn("the scorer failed")
    assert out.getvalue() == "warning: the scorer failed\n"


def test_text_that_the_terminal_cannot_encode_is_no_error(make_run):
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"))
    with Progress(make_run(), console=console) as progress:
        progress.note("数学 émigré")
    console.file.flush()
    assert raw.getvalue().endswith(b"?? ?migr?\n")


SCRIPT = """
import sys, time
from pathlib import Path
from verl.tracking import RunInfo, build_trackers

with build_trackers(["console"], RunInfo("gsm8k", "demo", Path("unused"), total_steps=4)) as trackers:
    for step in range(1, 5):
        with trackers.progress.stage("rollout", 8) as stage:
            for _ in range(8):
                time.sleep(0.1 if "slowly" in sys.argv else 0.01)
                stage.advance(tokens=50)
        with trackers.progress.stage("update_actor"):
            time.sleep(0.1)
        trackers.log({"critic/score/mean": step / 10, "timing_s/step": 0.26}, step)
        print("from another library")
        if step == 3 and "fail" in sys.argv:
            raise RuntimeError("in the middle of it")
Path(sys.argv[1]).write_text("done")
"""


def in_terminal(columns, arguments, repository, **environment):
    """What a process writes to a terminal of that width."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    clean = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=repository,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**clean, "TERM": "xterm-256color", **environment},
    )
    os.close(theirs)
    output = b""
    while select.select([ours], [], [], 60)[0]:
        try:
            block = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        if not block:
            break
        output += block
    os.close(ours)
    return process.wait(60), output.decode()


def test_a_terminal_shows_bars_of_the_run_and_of_the_stage(tmp_path, repository):
    code, shown = in_terminal(100, [str(tmp_path / "end"), "slowly"], repository)
    assert code == 0
    assert (tmp_path / "end").exists()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert re.search(r"step +.*[━╸╺ ]+3/4 0:00:\d\d left", text)
    assert re.search(r"rollout +.*\d/8 [\d,]+ tokens/s", text)
    assert re.search(r"4/4 +0\.400 +0\.26 +0:00:00", text)
    assert text.count("from another library") == 4
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") > -1  # the cursor was hidden and is back


def test_the_terminal_is_restored_when_the_run_fails(tmp_path, repository):
    code, shown = in_terminal(100, [str(tmp_path / "end"), "fail"], repository)
    assert code == 1
    assert "in the middle of it" in shown
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") > -1


@pytest.mark.parametrize("columns", [1, 7, 25])
def test_a_narrow_terminal_is_no_error(tmp_path, repository, columns):
    code, shown = in_terminal(columns, [str(tmp_path / "end")], repository)
    assert code == 0, shown
    assert "Traceback" not in shown


def test_no_color_and_dumb_terminals_are_respected(tmp_path, repository):
    _, shown = in_terminal(100, [str(tmp_path / "end")], repository, NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", shown)
    _, shown = in_terminal(100, [str(tmp_path / "end")], repository, TERM="dumb")
    assert "\x1b" not in shown


@pytest.mark.parametrize("output", ["| head -n 1", "| cat > /dev/full", "> /dev/full"])
def test_output_that_goes_nowhere_does_not_end_the_run(tmp_path, repository, output):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.replace('print("from another library")', "pass"))
    command = f"{sys.executable} {script} {tmp_path / 'end'} {output}"
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    subprocess.run(command, shell=True, timeout=60, capture_output=True, env=environment)
    assert (tmp_path / "end").exists()


def test_a_run_of_many_short_steps_does_not_print_a_row_for_each(make_run):
    clock = Clock()
    progress, out = plain_progress(make_run(total_steps=1000), clock)
    with progress:
        for step in range(1, 1001):
            clock.now += 0.1
            progress.step(step, {"train/loss": 1.0, **({"val/loss": 2.0} if step == 505 else {})})
    rows = [line for line in out.getvalue().splitlines() if "/1000" in line]
    assert 45 <= len(rows) <= 55
    assert rows[-1].strip().startswith("1000/1000")
    assert any(row.strip().startswith("505/1000") for row in rows)
