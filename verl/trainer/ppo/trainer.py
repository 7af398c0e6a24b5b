"""The PPO loop. A stage is a method that takes the step's table of samples and returns it with columns added."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from verl.agent.single_turn import episodes_of, greedy_episodes_of, roll_out
from verl.algorithms.advantages import AdvantageInputs, resolve
from verl.algorithms.batches import mini_batches
from verl.algorithms.corrections import importance_weights
from verl.algorithms.kl import kl_control
from verl.algorithms.losses import loss_columns
from verl.algorithms.rewards import response_rewards, token_rewards
from verl.checks import log_probs
from verl.cluster.base import WorkerGroup
from verl.config.sections.models import ActorConfig, Config, CriticConfig
from verl.data.loader import PromptLoader
from verl.data.schema import ragged, rows_of, with_columns
from verl.errors import UserError
from verl.plan import RunPlan, UpdatePlan
from verl.reward.manager import RewardManager
from verl.reward.model_inputs import RewardModelInputs
from verl.reward.pool import Outcome
from verl.rollout.client.backend import WeightStream
from verl.rollout.contract.base import Result, RolloutEngine, SamplingParams
from verl.tracking import StageTimer, Trackers
from verl.tracking.dumps import generation_rows
from verl.tracking.progress import Stage
from verl.trainer.checkpoints import Checkpoint, Checkpoints, SaveError
from verl.trainer.ppo import metrics as measure
from verl.trainer.ppo.dynamic_sampling import fill_step
from verl.trainer.ppo.learning_signal import LearningSignal
from verl.trainer.ppo.phases import Phases
from verl.trainer.ppo.sampling import greedy, training_sampling, validation_sampling
from verl.trainer.ppo.validation_metrics import validation_metrics
from verl.trainer.ppo.weight_updates import WeightUpdates

Metrics = dict[str, float]
VALIDATION = -1  # stands for the step in the seeds of validation responses: the same ones each time
LOG_PROB_CHECK = -2  # and of the responses on which engine and trainer are compared before the first step


class Trained(NamedTuple):
    """The models in training and the engine that generates. weights: the actor's, for the engine. abandon: ends what
    is elsewhere without waiting for it."""

    workers: WorkerGroup
    weights: Callable[[], WeightStream]
    rollout: RolloutEngine
    abandon: Callable[[], None] = lambda: None


@dataclass
class Parts:
    """What a run is put together from; ``verl.trainer.ppo.run`` does it. The first three: as in ``Trained``.

    rewards: None where the reward model alone scores. reward_inputs: None without a reward model."""

    workers: WorkerGroup
    weights: Callable[[], WeightStream]
    rollout: RolloutEngine
    rewards: RewardManager | None
    reward_inputs: RewardModelInputs | None
    tokenizer: PreTrainedTokenizerBase
    train_prompts: pa.Table
    val_prompts: pa.Table | None
    checkpoints: Checkpoints
    trackers: Trackers


class PPOTrainer:
    """``fit`` trains from ``step`` (0, or a checkpoint's after ``restore``) to the plan's last step.

    stop: asked after each step whether to end the run there; what is due at the end is then done.
    """

    def __init__(self, config: Config, plan: RunPlan, parts: Parts, stop: Callable[[], bool] = lambda: False):
        self.config, self.plan, self.parts, self.stop = config, plan, parts, stop
        self.step = 0
        self.loader = PromptLoader(
            parts.train_prompts.num_rows, plan.prompts, shuffle=config.data.shuffle, seed=config.data.seed
        )
        self.estimator = resolve(config.algorithm.adv_estimator)
        self.signal = LearningSignal(config, self.estimator)
        self.kl_control = kl_control(config.algorithm.kl_ctrl)
        self.metrics: Metrics = {}  # of the step under way
        self.timer = StageTimer()
        self.phases = Phases(parts.rollout, lambda tags: parts.workers.call("free_memory", tags).result())
        self.weight_updates = WeightUpdates(
            parts.rollout,
            parts.weights,
            self.phases,
            check=config.trainer.check_weights,
            stage=self.stage,
            loaded=lambda: self.loaded("actor"),
        )
        self.unsaved: SaveError | None = None  # why the save that was due last did not work

    # ---- the loop

    def fit(self) -> bool:
        """Whether the last step was reached."""
        self.update_rollout_weights()
        if self.config.trainer.check_log_probs:
            self.check_log_probs()
        if self.step == 0 and self.plan.validates(0):
            self.validate()
            self.parts.trackers.log(self.metrics, 0)
        stopping = self.stop()
        while self.step < self.plan.last_step and not stopping:
            self.step += 1
            self.metrics, self.timer = {}, StageTimer()
            with self.timer("step"):
                epoch, rows = next(self.loader)
                table = self.train_step(self.parts.train_prompts.take(rows))
                if self.plan.validates(self.step):
                    self.validate()
            self.report(table, epoch)  # before saving: who goes on from the checkpoint has this step's metrics
            stopping = self.stop()
            if self.plan.saves(self.step) or self.unsaved or (stopping and self.plan.save_freq > 0):
                self.save()
        if self.unsaved:
            raise self.unsaved
        return self.step == self.plan.last_step

    def train_step(self, prompts: pa.Table) -> pa.Table:
        table = self.roll_out(prompts)
        table = self.old_log_probs(table)
        table = self.rollout_correction(table)
        table = self.ref_log_probs(table)
        table = self.values(table)
        table = self.advantages(table)
        self.update_critic(table)
        self.update_actor(table)
        self.update_rollout_weights()
        return table

    # ---- stages

    def roll_out(self, prompts: pa.Table) -> pa.Table:
        """Responses and their scores; a response is scored while others are still being generated."""
        table, settings = self._respond(prompts), self.config.algorithm.filter_groups
        if settings.enable:
            size = {"groups": self.plan.prompts, "samples": self.plan.samples, "data_rows": self.loader.num_rows}
            table, given_back, metrics = fill_step(table, self._draw_more, settings, **size)
            self.loader.give_back(given_back)
            self.metrics |= metrics
        self.make_room_for_training()
        return table

    def _draw_more(self, count: int, draw: int) -> pa.Table:
        self._restore_weights()
        _, rows = self.loader.draw(count)
        return self._respond(self.parts.train_prompts.take(rows), draw)

    def _respond(self, prompts: pa.Table, draw: int = 0) -> pa.Table:
        """The responses to each prompt and, where the advantages ask for it, the reward of a greedy one."""
        rollout = self.config.actor_rollout_ref.rollout
        episodes = episodes_of(prompts, n=rollout.n, seed=self.config.trainer.seed, step=self.step, draw=draw)
        sampling = training_sampling(rollout, self.config.data.max_response_length)
        if not self.estimator.needs_greedy:
            return self._generate_and_score(episodes, sampling)
        both = pa.concat_tables([episodes, greedy_episodes_of(prompts, step=self.step)])
        samplings = [sampling] * episodes.num_rows + [greedy(sampling)] * prompts.num_rows
        table = self._generate_and_score(both, samplings)
        sampled, greedy_ones = table.slice(0, episodes.num_rows), table.slice(episodes.num_rows)
        rewards = response_rewards(greedy_ones, self.config)
        return with_columns(sampled, greedy_reward=np.repeat(rewards, rollout.n))

    def _generate_and_score(self, episodes: pa.Table, sampling: SamplingParams | Sequence[SamplingParams]) -> pa.Table:
        rewards = self.parts.rewards
        references = episodes.select(["data_source", "prompt", "ground_truth", "extra_info"]).to_pylist()
        scores: dict[int, Future[Outcome]] = {}  # by row
        with self.generating(), self.stage("gen", total=episodes.num_rows) as progress:

            def finished(index: int, result: Result) -> None:
                if rewards is not None:
                    scores[index] = rewards.submit(references[index], result.response_ids)
                progress.advance(tokens=len(result.response_ids))

            table = asyncio.run(roll_out(self.parts.rollout, episodes, sampling, finished))
        if rewards is not None:
            with self.stage("reward"):
                table, metrics = rewards.collect(table, [scores[row] for row in range(table.num_rows)])
            for name, sum_of_draw in metrics.items():  # counts and seconds, over all that the step draws
                self.metrics[name] = self.metrics.get(name, 0.0) + sum_of_draw
        if self.parts.reward_inputs is not None:
            self.make_room_for_training()
            table = self._reward_model_scores(table)
        return table

    def _reward_model_scores(self, table: pa.Table) -> pa.Table:
        """The reward model's score, in place of the scorers' or added to it."""
        assert self.parts.reward_inputs is not None
        with self.computing("reward_model", "reward"):
            scored = self.parts.workers.map("reward_scores", self.parts.reward_inputs(table)).result()
        found = scored["score"].to_numpy()
        if not np.isfinite(found).all():
            raise UserError(f"reward_model.model.path={self.config.reward_model.model.path} gives scores not finite")
        score = found + table["score"].to_numpy() if self.parts.rewards else found
        return with_columns(table, score=score, reward_model_score=found)

    def _restore_weights(self) -> None:
        """To an engine that lost them in its sleep, while the reward model scored."""
        if self.parts.reward_inputs is not None and self.parts.rollout.capabilities.sleep:
            self._send_weights()

    def old_log_probs(self, table: pa.Table) -> pa.Table:
        with self.computing("old_log_prob", "actor"):
            return self.parts.workers.map("old_log_probs", table).result()

    def rollout_correction(self, table: pa.Table) -> pa.Table:
        """Weights that make up for the engine's probabilities not being quite the trainer's, where asked for."""
        settings = self.config.algorithm.rollout_correction
        if settings.level is None:
            return table
        old, rollout, mask = (ragged(table, name) for name in ("old_log_probs", "rollout_log_probs", "response_mask"))
        weights, metrics = importance_weights(old, rollout, mask, settings)
        self.metrics |= metrics
        return with_columns(table, rollout_is_weights=weights)

    def ref_log_probs(self, table: pa.Table) -> pa.Table:
        if "reference" not in self.plan.roles:
            return table
        with self.computing("ref", "reference"):
            return self.parts.workers.map("ref_log_probs", table).result()

    def values(self, table: pa.Table) -> pa.Table:
        if "critic" not in self.plan.roles:
            return table
        with self.computing("values", "critic"):
            return self.parts.workers.map("values", table).result()

    def advantages(self, table: pa.Table) -> pa.Table:
        """Token rewards, advantages and returns."""
        with self.stage("adv"):
            rewards, metrics = token_rewards(table, self.config, self.kl_control)
            self.metrics |= metrics
            inputs = AdvantageInputs(
                token_rewards=rewards,
                response_mask=ragged(table, "response_mask"),
                values=ragged(table, "values") if "values" in table.column_names else None,
                group=table["group"].to_numpy(),
                settings=self.config.algorithm,
                greedy_rewards=table["greedy_reward"].to_numpy() if self.estimator.needs_greedy else None,
            )
            advantages, returns = self.estimator(inputs)
            return with_columns(table, token_rewards=rewards, advantages=advantages, returns=returns)

    def update_critic(self, table: pa.Table) -> None:
        if self.plan.critic:
            self._update("critic", self.plan.critic, self.config.critic, table)

    def update_actor(self, table: pa.Table) -> None:
        if self.plan.trains_actor(self.step):
            self._update("actor", self.plan.actor, self.config.actor_rollout_ref.actor, table)

    def _update(self, role: str, plan: UpdatePlan, settings: ActorConfig | CriticConfig, table: pa.Table) -> None:
        """All of a step's optimizer steps of one model. Metrics are means over them; skipped ones are counted."""
        batches = mini_batches(
            table["group"].to_numpy(),
            plan.mini_batch_size,
            epochs=plan.epochs,
            shuffle=settings.shuffle,
            seed=self.config.trainer.seed,
            step=self.step,
        )
        found: dict[str, list[float]] = defaultdict(list)
        sent = role == "actor"  # to the rollout engine, next
        with self.computing(f"update_{role}", role, total=len(batches), optimizer=True, needed=sent) as progress:
            for number, rows in enumerate(batches):
                mini = rows_of(table, rows)
                seed = (self.config.trainer.seed, self.step, number)
                mini = with_columns(mini, **loss_columns(mini, settings, self.plan.max_response_length, seed))
                tokens = max(int(ragged(mini, "response_mask").values.sum()), 1)
                metrics = self.parts.workers.reduce(f"update_{role}", mini, num_tokens=tokens).result()
                for name, value in metrics.items():
                    found[name].append(value)
                progress.advance()
            self.parts.workers.call("step_schedule", role).result()
        skipped = found.pop(f"{role}/skipped_steps")
        self.metrics |= {name: float(np.mean(values)) for name, values in found.items()}
        self.metrics[f"{role}/skipped_steps"] = sum(skipped)

    def update_rollout_weights(self) -> None:
        """The engine gets the actor's weights; its own copy is compared with them as trainer.check_weights says."""
        self.weight_updates.version = self.step
        self._send_weights()

    def _send_weights(self) -> None:
        for name, seconds in self.weight_updates.send().items():
            self.metrics[name] = self.metrics.get(name, 0.0) + seconds  # of all the step's updates, as the stage's

    # ---- around the step

    def check_log_probs(self) -> None:
        """UserError where the engine works with another distribution than the trainer (verl.checks.log_probs)."""
        rollout, workers, data = self.config.actor_rollout_ref.rollout, self.parts.workers, self.config.data
        prompts = self.parts.train_prompts.slice(0, log_probs.PROMPTS)
        episodes = episodes_of(prompts, n=1, seed=self.config.trainer.seed, step=LOG_PROB_CHECK)
        sampling = log_probs.check_sampling(training_sampling(rollout, data.max_response_length))
        with self.stage("log_prob_check"):
            with self.generating():
                table = asyncio.run(roll_out(self.parts.rollout, episodes, sampling))
            self.make_room_for_training()

            def score(temperature: float) -> pa.Table:
                return workers.map("log_probs_at", table, temperature=temperature).result()

            with self.loaded("actor"):
                found = log_probs.check_log_probs(table, score, self.config, sampling, self.plan.device)
            if self.parts.rollout.capabilities.sleep:
                self.update_rollout_weights()
        self.parts.trackers.progress.note(found)

    def validate(self) -> None:
        """Answers to the validation prompts: scored, dumped, and summed up as ``val-core/...`` and ``val-aux/...``."""
        config, rollout = self.config.trainer, self.config.actor_rollout_ref.rollout
        if self.parts.val_prompts is None:
            return
        training_metrics, self.metrics = self.metrics, {}
        with self._timed_as("testing"):
            episodes = episodes_of(self.parts.val_prompts, n=rollout.val_kwargs.n, seed=config.seed, step=VALIDATION)
            sampling = validation_sampling(rollout, self.plan.max_response_length)
            table = self._generate_and_score(episodes, sampling)
            self._restore_weights()
        found = validation_metrics(table, seed=config.seed)
        others = {
            f"val-aux/{name.replace('/', '_', 1)}": value
            for name, value in (self.metrics | measure.reward_model_metrics(table)).items()
            if name.startswith("reward")
        }
        self.metrics = training_metrics | found | others
        rows = self._dump(self.validation_folder, table)
        self.parts.trackers.log_samples(rows[: config.log_val_generations], self.step)

    @property
    def validation_folder(self) -> Path:
        trainer = self.config.trainer
        return Path(trainer.validation_data_dir or f"{trainer.default_local_dir}/validation").expanduser()

    def save(self) -> None:
        """A disk that is full costs the run nothing: the save is tried again after each step until it works."""
        state = {"step": self.step, "loader": self.loader.state_dict(), "kl_control": self.kl_control.state_dict()}
        with self.stage("save_checkpoint"):
            try:
                self.parts.checkpoints.save(self.step, self._write_models, state)
                self.unsaved = None
            except SaveError as error:
                self.unsaved = error
                self.parts.trackers.progress.warn(f"{error}. Training goes on; saving is tried again after each step.")
        self.parts.trackers.log({"timing_s/save_checkpoint": self.timer.seconds["save_checkpoint"]}, self.step)

    def _write_models(self, folder: Path) -> None:
        self.phases.update()  # a validation left the engine all awake; an export loads models
        self.parts.workers.call("save", folder).result()

    def restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state()
        self.step = state["step"]
        self.loader.load_state_dict(state["loader"])
        self.kl_control.load_state_dict(state["kl_control"])
        self.parts.workers.call("restore", checkpoint.folder).result()

    def report(self, table: pa.Table, epoch: int) -> None:
        lengths = measure.sequence_lengths(table)
        self.metrics |= {
            "training/global_step": self.step,
            "training/epoch": epoch,
            **measure.data_metrics(table, max_prompt_length=self.plan.max_prompt_length),
            **measure.rollout_mismatch_metrics(table),
            **measure.reward_model_metrics(table),
            **measure.seqlen_metrics(lengths, self.parts.workers.shares(table)),
            **measure.timing_metrics(self.timer.seconds, table, num_devices=self.plan.world_size),
            **measure.most_of(self.parts.workers.call("memory_metrics").result()),
        }
        self.parts.trackers.log(self.metrics, self.step)
        if warning := self.signal.warning(table, self.step, self._decode):
            self.parts.trackers.progress.warn(warning)
        if folder := self.config.trainer.rollout_data_dir:
            self._dump(Path(folder).expanduser(), table)

    # ---- helpers

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        with self.timer(name), self.parts.trackers.progress.stage(name, total) as stage:
            yield stage

    @contextmanager
    def computing(
        self, name: str, role: str, *, total: int | None = None, optimizer: bool = False, needed: bool = False
    ) -> Iterator[Stage]:
        """A stage of a model's compute, with what it takes among the metrics: if a step has several, the last one's MFU
        and memory, and the seconds of all. needed: as for ``loaded``."""
        before, inside = self.timer.seconds.get(name, 0.0), StageTimer()
        with self.stage(name, total) as progress, self.loaded(role, optimizer, needed) as costs, inside("compute"):
            yield progress
        seconds = self.timer.seconds[name] - before
        self.metrics |= measure.stage_metrics(name, costs, seconds)
        load = f"timing_part_s/{name}/load"
        self.metrics[load] = self.metrics.get(load, 0.0) + seconds - inside.seconds["compute"]

    @contextmanager
    def _timed_as(self, name: str) -> Iterator[None]:
        """The stages inside count as this one."""
        outer, self.timer = self.timer, StageTimer()
        try:
            with outer(name):
                yield
        finally:
            self.timer = outer

    @contextmanager
    def generating(self) -> Iterator[None]:
        """The engine can draw: its memory is its own again, or the model that it borrows is loaded (and whole)."""
        borrows = not self.parts.rollout.capabilities.holds_weights
        with self.loaded("actor") if borrows else nullcontext():
            if self.parts.rollout.capabilities.sleep:
                with self.stage("wake"):
                    self.phases.generate()
            yield
            if borrows:
                self.phases.train()

    def make_room_for_training(self) -> None:
        if self.parts.rollout.capabilities.sleep:
            with self.stage("sleep"):
                self.phases.train()

    @contextmanager
    def loaded(self, role: str, optimizer: bool = False, needed: bool = False) -> Iterator[list[measure.StageCost]]:
        """The role's model on the device, for a stage; gives a list that at the end has what it took of each rank.
        needed: its parameters stay there, and the next stage loads and unloads this role, too."""
        costs: list[measure.StageCost] = []
        self.parts.workers.call("load", role, optimizer).result()
        yield costs
        # not after an error, which is the end of the run
        costs += self.parts.workers.call("unload", role, needed).result()

    def _dump(self, folder: Path, table: pa.Table) -> list[dict]:
        rows = generation_rows(table, self._decode, self.step)
        for file_format in self.config.trainer.generations_format:
            self.parts.trackers.dump(folder, self.step, rows, file_format)
        return rows

    def _decode(self, rows: list[list[int]]) -> list[str]:
        return self.parts.tokenizer.batch_decode(rows, skip_special_tokens=True)
