"""The driver's own part of a PPO step over many ranks: seconds, and memory beyond what the process holds before it.

    python benchmarks/controller.py [--steps 5] [--out FILE]

Real: the trainer's methods (GAE, KL penalty in the reward, critic and actor in 4 mini-batches each), the tables, Ray's
calls and object store. Left out: generation (a stub hands out responses, and the time in which it makes them is taken
off), decoding and scoring (the scores are there at once), weight updates, and the ranks' compute: 2 actors take turns
at being all ranks, 8 to a node, and answer at once.

Seconds are those of one step: the one that took the driver the least CPU time, the first left out.
    wall: by stage, and of the whole step. The actors and the driver share this machine's cores.
    CPU: of the driver's main thread, of all its threads (Ray's own among them), and of the 2 actors for all ranks.
GiB are the most in any step beyond what was there before the first.
    heap: the driver's own memory. store: pages that it shares with others, which are those of Ray's object store that
    it has written or read. Each line is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import pyarrow as pa

from verl.cluster.ray.group import RayRanks, RayWorkerGroup
from verl.cluster.ray.placement import place, remove
from verl.cluster.ray.rank import RankContext
from verl.cluster.ray.start import RaySettings, connected
from verl.config.loading.load import Loaded, load
from verl.config.sections.models import Config
from verl.data.ragged import Ragged, offsets_of
from verl.data.schema import PROMPT_COLUMNS, ragged, with_columns
from verl.plan import plan_run
from verl.reward.manager import RewardManager
from verl.reward.pool import Outcome
from verl.rollout.contract.base import Capabilities, Request, Result
from verl.rollout.loop import EventLoop
from verl.tracking import Trackers
from verl.tracking.progress import Progress, Stage
from verl.tracking.run import RunInfo
from verl.trainer.ppo.metrics import StageCost, memory_metrics
from verl.trainer.ppo.ranks import token_shares
from verl.trainer.ppo.run import build_trainer
from verl.trainer.ppo.runtime import Runtime
from verl.trainer.ppo.samples import Samples
from verl.trainer.ppo.step_log import StepLog
from verl.trainer.ppo.trainer import PPOTrainer
from verl.trainer.ppo.worker import READS

CASES = [(4096, 8), (4096, 64), (4096, 256), (1024, 64), (2048, 64)]  # samples, ranks
PROMPT, RESPONSE = 512, 2048  # tokens
SAMPLES_A_PROMPT, MINI_BATCHES = 4, 4
VOCABULARY = 150_000
DEVICES = 8  # ranks of a node
ACTORS = 2
SHOWN = {
    "rollout": ("gen", "reward"),
    "forwards": ("old_log_prob", "ref", "values"),
    "adv": ("adv",),
    "updates": ("update_critic", "update_actor"),
    "report": ("report",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--samples", type=int, help="with --ranks: this case only")
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--out", type=Path, help="JSON file for the figures, those of each stage too")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_this_process:
        print(json.dumps(measure(args.samples, args.ranks, args.steps)))
        return
    cases = [(args.samples, args.ranks)] if args.samples and args.ranks else CASES
    found = [in_a_fresh_process(samples, ranks, args.steps) for samples, ranks in cases]
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))
    print_table(found)


def in_a_fresh_process(samples: int, ranks: int, steps: int) -> dict[str, Any]:
    case = ["--samples", samples, "--ranks", ranks, "--steps", steps, "--in-this-process"]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])  # of the actors
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, __file__, *map(str, case)], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def print_table(found: Sequence[dict[str, Any]]) -> None:
    heads = ["samples", "ranks", *SHOWN, "step", "main", "driver", "ranks", "heap", "store"]
    print(f"{os.cpu_count()} cores; {PROMPT} + {RESPONSE} tokens a sample\n")
    print(f"{'':16}{'wall seconds':>{9 * len(SHOWN) + 9}}{'CPU seconds':>27}{'GiB':>18}")
    print("".join(f"{head:>{8 if place < 2 else 9}}" for place, head in enumerate(heads)))
    for case in found:
        wall, step = case["wall"], case["step"]
        stages = [sum(wall[stage] for stage in stages) for stages in SHOWN.values()]
        figures = [*stages, step["wall"], step["main"], step["driver"], step["ranks"], case["heap"], case["store"]]
        print(f"{case['samples']:8}{case['ranks']:8}" + "".join(f"{figure:9.2f}" for figure in figures))


# ---- one case


def measure(samples: int, ranks: int, steps: int) -> dict[str, Any]:
    with connected(RaySettings("local", {}, ACTORS), lambda text: None), tempfile.TemporaryDirectory() as logs:
        seats = place(1, ACTORS, "cpu", timeout=60)
        real = RayRanks(seats, "cpu", logs=Path(logs), timeout=600.0)
        try:
            meter = Meter([psutil.Process(pid) for pid in real.pids])
            loop = EventLoop()
            trainer = assemble(samples, ranks, as_many(real, ranks), meter, loop)
            with PeakMemory() as memory:
                for _ in range(steps + 1):
                    one_step(trainer, meter)
        finally:
            loop.close()
            real.close()
            remove(seats)
    best = min(meter.steps[1:], key=lambda stages: stages["step"].driver)
    return {
        "samples": samples,
        "ranks": ranks,
        "wall": {stage: seconds.wall for stage, seconds in best.items()},
        "step": asdict(best["step"]),
        "heap": memory.heap / 2**30,
        "store": memory.store / 2**30,
    }


def as_many(real: RayRanks, ranks: int) -> RayWorkerGroup:
    """The group of so many ranks: each actor is many of them. Puts, calls and answers are as many as in a run."""
    real.make("worker", "controller:make_worker")
    crowd = object.__new__(RayRanks)
    crowd.__dict__ |= real.__dict__
    crowd.world_size, crowd.actors = ranks, [real.actors[rank % ACTORS] for rank in range(ranks)]
    crowd.seats = [replace(real.seats[rank % ACTORS], rank=rank, node=rank // DEVICES) for rank in range(ranks)]
    return RayWorkerGroup(crowd, "worker", token_shares(balance=True), READS)


def assemble(samples: int, ranks: int, group: RayWorkerGroup, meter: Meter, loop: EventLoop) -> PPOTrainer:
    prompts = samples // SAMPLES_A_PROMPT
    config = settings(prompts, ranks)
    plan = plan_run(config, device="cpu", train_rows=prompts)
    trackers = Trackers({}, meter)
    return build_trainer(
        config,
        plan,
        Runtime(loop, group, StubEngine(meter), lambda: iter(()), meter),  # type: ignore[arg-type]
        StubRewards(config),
        None,
        synthetic_prompts(prompts),
        None,
        None,  # type: ignore[arg-type]
        trackers,
        Samples(config, None, trackers),  # type: ignore[arg-type]
        start=None,
        stop=lambda: False,
    )


def settings(prompts: int, ranks: int) -> Config:
    mini_batch = prompts // MINI_BATCHES
    loaded: Loaded[Config] = load(
        [
            "data.train_files=none.parquet",
            f"data.train_batch_size={prompts}",
            f"data.max_prompt_length={PROMPT}",
            f"data.max_response_length={RESPONSE}",
            "algorithm.adv_estimator=gae",
            "algorithm.use_kl_in_reward=True",
            "actor_rollout_ref.model.path=none",
            "actor_rollout_ref.rollout.name=sglang",
            f"actor_rollout_ref.rollout.n={SAMPLES_A_PROMPT}",
            f"actor_rollout_ref.actor.ppo_mini_batch_size={mini_batch}",
            f"critic.ppo_mini_batch_size={mini_batch}",
            f"trainer.nnodes={ranks // DEVICES}",
            f"trainer.n_gpus_per_node={DEVICES}",
            "trainer.device=cpu",
            "trainer.check_weights=never",
        ]
    )
    assert loaded.config is not None, loaded.problems
    return loaded.config


def one_step(trainer: PPOTrainer, meter: Meter) -> None:
    """As ``PPOTrainer.fit`` does it."""
    meter.steps.append({})
    trainer.step += 1
    trainer.feed.released(trainer.step - 1)
    log = StepLog()
    with meter.stage("step"):
        table = trainer.train_step(log)
        with meter.stage("report"):
            trainer.report(table, log)


def synthetic_prompts(count: int) -> pa.Table:
    ids = np.random.default_rng(0).integers(0, VOCABULARY, count * PROMPT)
    text = json.dumps([{"role": "user", "content": "x" * 4 * PROMPT}])
    columns: dict[str, Any] = {
        "row": np.arange(count),
        "data_source": ["synthetic"] * count,
        "prompt": [text] * count,
        "ground_truth": ["42"] * count,
        "extra_info": ["{}"] * count,
        "images": [[]] * count,
        "prompt_ids": Ragged(ids, offsets_of(np.full(count, PROMPT))).to_column().cast(PROMPT_COLUMNS["prompt_ids"]),
    }
    return pa.table({name: pa.array(columns[name], kind) for name, kind in PROMPT_COLUMNS.items()})


# ---- what stands for the engine, the scorers and the ranks


class StubEngine:
    """Responses at once, as the lists that an engine hands out. The meter takes off the time that making them takes."""

    capabilities = Capabilities()
    update_seconds: ClassVar[dict[str, float]] = {}

    def __init__(self, meter: Meter):
        self._meter, self._draw = meter, np.random.default_rng(0)

    async def generate(self, requests: Sequence[Request]) -> list[Result]:
        with self._meter.left_out():
            return [self._respond(request) for request in requests]

    def _respond(self, request: Request) -> Result:
        ids = self._draw.integers(0, VOCABULARY, RESPONSE).tolist()
        return Result(request.id, ids, (-self._draw.random(RESPONSE)).tolist(), "length", [(0, 0)])

    async def update_weights(self, stream: Iterator, version: int) -> None:
        pass


class StubRewards(RewardManager):
    def __init__(self, config: Config):
        self._config = config.reward

    def submit(self, episode: Any, response_ids: Sequence[int]) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        future.set_result(Outcome((float(response_ids[0] % 2), "{}")))
        return future


def make_worker(context: RankContext) -> StubWorker:
    return StubWorker()


class StubWorker:
    """Answers at once as a ``PPOWorker`` would, with columns of the right shape and type."""

    def old_log_probs(self, rows: pa.Table) -> pa.Table:
        return with_columns(rows, old_log_probs=column_for(rows), entropy=column_for(rows))

    def ref_log_probs(self, rows: pa.Table) -> pa.Table:
        return with_columns(rows, ref_log_probs=column_for(rows))

    def values(self, rows: pa.Table) -> pa.Table:
        return with_columns(rows, values=column_for(rows))

    def update_actor(self, rows: pa.Table, num_tokens: int) -> dict[str, float]:
        return {"actor/pg_loss": 0.0, "actor/grad_norm": 1.0, "actor/lr": 1e-6, "actor/skipped_steps": 0.0}

    def update_critic(self, rows: pa.Table, num_tokens: int) -> dict[str, float]:
        return {"critic/vf_loss": 0.0, "critic/grad_norm": 1.0, "critic/lr": 1e-5, "critic/skipped_steps": 0.0}

    def step_schedule(self, role: str) -> None: ...
    def load(self, role: str, optimizer: bool = False) -> None: ...
    def unload(self, role: str, needed: bool = False) -> StageCost:
        return StageCost(0.0, 0.0, 0)

    def free_memory(self, tags: Sequence[str]) -> None: ...
    def memory_metrics(self) -> dict[str, float]:
        return memory_metrics()


def column_for(rows: pa.Table) -> Ragged:
    responses = ragged(rows, "response_ids")
    return responses.like(np.linspace(-1.0, 0.0, len(responses.values), dtype=np.float32))


# ---- measuring


@dataclass(frozen=True)
class Seconds:
    """wall; CPU of the driver's main thread, of all its threads, and of the ranks' processes."""

    wall: float
    main: float
    driver: float
    ranks: float

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Meter(Progress):
    """Seconds of each stage of each step, in the place of the run's progress: the trainer tells it its stages."""

    def __init__(self, actors: Sequence[psutil.Process]) -> None:
        super().__init__(RunInfo("benchmarks", "controller", Path()), show=False)
        self.steps: list[dict[str, Seconds]] = []
        self._actors, self._left_out = actors, 0.0

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        before = self._now()
        with super().stage(name, total) as stage:
            yield stage
        self.steps[-1][name] = self._now() - before

    @contextmanager
    def left_out(self) -> Iterator[None]:
        begun = time.thread_time()
        yield
        self._left_out += time.thread_time() - begun

    def _now(self) -> Seconds:
        ranks = sum(sum(actor.cpu_times()[:2]) for actor in self._actors)
        wall, driver = (seconds - self._left_out for seconds in (time.perf_counter(), time.process_time()))
        main = time.thread_time()  # without the event loop's thread, in which the responses are made
        return Seconds(wall, main, driver, ranks)


class PeakMemory:
    """heap, store: bytes of this process, its own and shared with others, at most, beyond those at the start."""

    def __enter__(self) -> PeakMemory:
        self._base = self._now()
        self.heap = self.store = 0
        self._end = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._sampler.join()

    def _sample(self) -> None:
        while not self._end.wait(0.005):
            heap, store = self._now()
            self.heap, self.store = max(self.heap, heap - self._base[0]), max(self.store, store - self._base[1])

    @staticmethod
    def _now() -> tuple[int, int]:
        lines = Path("/proc/self/status").read_text().splitlines()
        kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if "Rss" in name}
        return kib["RssAnon"] << 10, kib["RssShmem"] << 10


if __name__ == "__main__":
    main()
