"""Generates responses to a file of prompts, batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from verl.agent.single_turn import episodes_of, roll_out
from verl.checks.generation import plan_of
from verl.config.loading.load import Loaded
from verl.config.sections.models import GenerationConfig
from verl.data.schema import ragged
from verl.data.tokenizer import decode, load_tokenizer
from verl.errors import UserError
from verl.findings import Findings
from verl.plan import ceil_div
from verl.rollout.contract.base import Result, RolloutEngine, SamplingParams
from verl.rollout.loop import EventLoop
from verl.tracking import RunInfo, StageTimer, Trackers, build_trackers
from verl.trainer.generation.engine import start, start_on_ray
from verl.trainer.generation.output import Output
from verl.trainer.generation.prompts import RESPONSES, load
from verl.trainer.interrupt import INTERRUPTED, StopRequest
from verl.trainer.ppo.sampling import training_sampling
from verl.trainer.runs import finishes, last_words, say

GENERATION = -3  # takes the place of the step in the seeds of the responses
# Rollout settings that change where and how fast responses are generated, but not which.
PLACEMENT = {
    "max_num_seqs",
    "max_num_batched_tokens",
    "tensor_model_parallel_size",
    "gpu_memory_utilization",
    "enforce_eager",
    "engine_kwargs",
    "mode",
    "server_urls",
    "server_api_key_env",
}
STOPPING = "stopping after this batch (Ctrl-C again: at once)"


def run(loaded: Loaded[GenerationConfig], findings: Findings) -> int:
    """The exit code. findings: what the checks found, without a problem."""
    config = loaded.config
    assert config is not None
    say(findings)
    tokenizer = load_tokenizer(config.model.tokenizer_path, config.model.trust_remote_code)
    rows, prompts = load(config.data, tokenizer, lambda text: print(f"notice: {text}"))
    batches = ceil_div(rows.num_rows, config.data.batch_size)
    output = Output(Path(config.data.output_path).expanduser(), deciding(config, rows), batches)
    missing = output.missing()
    info = RunInfo("verl", "generation", output.path, total_steps=batches, resume_step=batches - len(missing) or None)
    finished = not missing
    with ExitStack() as stack:
        trackers = stack.enter_context(build_trackers(["console"], info))
        if info.resume_step:
            trackers.progress.note(f"resuming: {info.resume_step} of {batches} batches are in {output.folder}")
        stop = stack.enter_context(StopRequest(lambda: trackers.progress.note(STOPPING)))
        if missing:
            plan, loop = plan_of(config), EventLoop()
            stack.callback(loop.close)
            begin = start_on_ray if plan.uses_ray else start
            engine, abandon = begin(stack, loop, config, plan, tokenizer, output.folder, trackers.progress)
            generation = Generation(config, loop, engine, tokenizer, rows, prompts, output, trackers, plan.world_size)
            finished = finishes(lambda: generation.run(missing, lambda: stop.requested), abandon)
    if not finished:
        done = batches - len(output.missing())
        last_words(f"Stopped. {done} of {batches} batches are in {output.folder}. The same command resumes from there.")
        return INTERRUPTED
    output.finish()
    last_words(f"{rows.num_rows:,} prompts with {config.rollout.n} responses each are in {output.path}.")
    return 0


def deciding(config: GenerationConfig, rows: pa.Table) -> dict[str, Any]:
    """All settings that decide the responses and how they are cut into parts."""
    sections = {
        "data": config.data.model_dump(exclude={"output_path"}),
        "model": config.model.model_dump(),
        "rollout": config.rollout.model_dump(exclude=PLACEMENT),
        "trainer": {"seed": config.trainer.seed},
    }
    named = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    return named | {"prompts": rows.num_rows}


class Generation:
    """Generates responses batch by batch and writes them.

    rows, prompts: as ``verl.trainer.generation.prompts.load`` returns them. loop: runs the engine's coroutines.
    devices: number of devices of all replicas.
    """

    def __init__(
        self,
        config: GenerationConfig,
        loop: EventLoop,
        engine: RolloutEngine,
        tokenizer: PreTrainedTokenizerBase,
        rows: pa.Table,
        prompts: pa.Table,
        output: Output,
        trackers: Trackers,
        devices: int,
    ):
        self.config, self.loop, self.engine, self.tokenizer = config, loop, engine, tokenizer
        self.rows, self.prompts, self.output, self.trackers, self.devices = rows, prompts, output, trackers, devices

    def run(self, missing: list[int], stop: Callable[[], bool]) -> bool:
        """Whether all missing batches were written."""
        for batch in missing:
            if stop():
                return False
            self.write(batch)
        return True

    def write(self, batch: int) -> None:
        size, timer = self.config.data.batch_size, StageTimer()
        with timer("step"):
            responses = self.respond(self.prompts.slice(batch * size, size))
            table = self.rows.slice(batch * size, size)
            for name in RESPONSES.names:
                table = table.append_column(RESPONSES.field(name), responses[name])
            try:
                self.output.write(batch, table)
            except OSError as error:
                raise UserError(
                    f"batch {batch} could not be written to {self.output.folder}: {error}. Make room there; the same "
                    "command then resumes with this batch"
                ) from error
        self.report(batch, responses, timer.seconds["step"])

    def respond(self, prompts: pa.Table) -> pa.Table:
        """One row per prompt, with the columns of ``RESPONSES``."""
        n = self.config.rollout.n
        episodes = episodes_of(prompts, n=n, seed=self.config.trainer.seed, step=GENERATION)
        with self.trackers.progress.stage("gen", total=episodes.num_rows) as progress:

            def finished(index: int, result: Result) -> None:
                progress.advance(tokens=len(result.response_ids))

            table = self.loop.run(roll_out(self.engine, episodes, self.sampling, finished))
        texts = [decode(self.tokenizer, ids) for ids in table["response_ids"].to_pylist()]
        lengths, reasons = ragged(table, "response_ids").lengths.tolist(), table["finish_reason"].to_pylist()
        columns = [[each[i : i + n] for i in range(0, len(each), n)] for each in (texts, lengths, reasons)]
        return pa.table(columns, schema=RESPONSES)

    @property
    def sampling(self) -> SamplingParams:
        return training_sampling(self.config.rollout, self.config.data.max_response_length)

    def report(self, batch: int, responses: pa.Table, seconds: float) -> None:
        lengths = np.concatenate(responses["response_tokens"].to_pylist())
        reasons = [reason for row in responses["finish_reasons"].to_pylist() for reason in row]
        metrics = {
            "response_length/mean": float(lengths.mean()),
            "response_length/clip_ratio": reasons.count("length") / len(reasons),
            "perf/throughput": float(lengths.sum()) / seconds / self.devices,
            "timing_s/step": seconds,
        }
        self.trackers.log(metrics, batch + 1)
