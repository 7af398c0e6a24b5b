"""What the conformance suite needs of an engine, one kit for each. A new engine is a new class in ``KITS``."""

from __future__ import annotations

import asyncio
import atexit
import importlib.metadata
import os
import shutil
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import records
import slow_sglang
import torch
from helpers import with_tests_folder
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from verl.rollout.client.engine import ClientEngine
from verl.rollout.contract.base import Result, RolloutEngine
from verl.rollout.embedded.engine import HFEngine
from verl.rollout.engines.sglang.arguments import SGLANG
from verl.rollout.engines.vllm.arguments import VLLM
from verl.rollout.processes.adapter import Adapter, EngineSettings, installed
from verl.rollout.processes.subprocess_backend import SubprocessBackend
from verl.rollout.replicas.embedded import EmbeddedBackend
from verl.rollout.replicas.host import EngineHost, Place
from verl.rollout.replicas.layout import ReplicaRanks
from verl.rollout.replicas.remote import RemoteBackend

VOCABULARY, EOS, CONTEXT = 100, 1, 160


def tiny_model(seed: int) -> Qwen2ForCausalLM:
    """Random weights, large enough that distributions are neither flat nor sharp."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=CONTEXT,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=EOS,
            pad_token_id=0,
        )
        return Qwen2ForCausalLM(config).eval()


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """Every token is one character, a different one each."""
    vocabulary = {chr(0x4E00 + index): index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=chr(0x4E00)))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class HFKit:
    """trainer: the model whose weights the engine has to have after ``update_weights``.
    tolerance: how far a log-prob may be from the trainer's forward. engine, how: in records.Record."""

    engine, how = "hf", "in the trainer's process"
    device = "cpu"
    tolerance = 5e-5
    context, eos, vocabulary = CONTEXT, EOS, VOCABULARY

    def __init__(self) -> None:
        self.trainer = tiny_model(seed=0)
        self.tokenizer = letters_tokenizer()

    @classmethod
    def version(cls) -> str:
        return f"transformers {importlib.metadata.version('transformers')}"

    def build(self, max_num_seqs: int = 8, tokenizer: bool = True) -> RolloutEngine:
        return HFEngine(
            self.trainer,
            self.tokenizer if tokenizer else None,
            eos_token_ids=[EOS],
            max_model_len=CONTEXT,
            max_num_seqs=max_num_seqs,
        )

    def slots(self, asked: int) -> int:
        """How many responses an engine built with this max_num_seqs draws at a time."""
        return asked

    def same(self, result: Result, other: Result) -> bool:
        """Whether a seeded engine answered one request alike: to the last bit."""
        return result == other

    def train(self) -> None:
        """Change the trainer's weights."""
        with torch.no_grad():
            for param, other in zip(self.trainer.parameters(), tiny_model(seed=1).parameters(), strict=True):
                param.copy_(other)

    async def generate_some(self) -> None:
        """Let requests be under way: some tokens, but not 60."""
        for _ in range(12):
            await asyncio.sleep(0)

    def done(self) -> None:
        """A test has ended."""


class HFOnARankKit(HFKit):
    """The embedded engine of a rank, as its driver uses it; the two are one process here."""

    how = "in a rank's"

    def __init__(self) -> None:
        super().__init__()
        self.built: list[tuple[ClientEngine, EngineHost]] = []
        self.generated = 0  # forwards of the engine that draw a token each, since the last ``draw_some``

        def count(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.generated += "past_key_values" in kwargs

        self.trainer.register_forward_pre_hook(count, with_kwargs=True)

    def build(self, max_num_seqs: int = 8, tokenizer: bool = True) -> ClientEngine:
        place = Place(None, None, "127.0.0.1:1")
        engine = super().build(max_num_seqs, tokenizer)
        host = EngineHost(0, ReplicaRanks(0, 0, 1, 1), lambda: place, lambda places: EmbeddedBackend(engine))
        facts = host.start([place])

        def ask(method: str, *args: Any, timeout: float | None = None) -> Any:
            return getattr(host, method)(*args)

        client = ClientEngine(
            RemoteBackend(host.replica, ask, facts, {0: facts["pid"]}, lambda: host.stop(facts["number"])),
            self.tokenizer if tokenizer else None,
            eos_token_ids=[EOS],
            max_model_len=CONTEXT,
            vocab_size=VOCABULARY,
        )
        self.built.append((client, host))
        return client

    async def generate_some(self) -> None:
        """Until the engine, in its own thread, has drawn a few tokens of what is running."""
        self.generated, deadline = 0, time.monotonic() + 30
        while self.generated < 5 and time.monotonic() < deadline:
            await asyncio.sleep(0.001)

    def done(self) -> None:
        for client, host in self.built:
            asyncio.run(client.close())
            host.close()


class Shared(SubprocessBackend):
    """One engine for all tests of a session: a test that closes its engine leaves the process alone."""

    under_test: ClientEngine | None = None

    def close(self) -> None:
        if self.process.death or self.under_test is None:
            super().close()


class OwnProcessKit(HFKit):
    """A real engine in a process of its own, on the GPU where there is one, which finds the tests' modules.
    environment, extra: besides ours."""

    adapter: Adapter
    extra: ClassVar[dict[str, Any]] = {}
    environment: ClassVar[dict[str, str]] = {}

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tolerance = 0.25 if device == "cuda" else 5e-5  # bfloat16 logits of up to 16, float32
    how = "tensor-parallel size 1"
    tensor_parallel = 1
    backends: ClassVar[dict[type[OwnProcessKit], Shared]] = {}

    def __init__(self) -> None:
        super().__init__()
        dtype = "bfloat16" if self.device == "cuda" else "float32"
        self.trainer.to(self.device, getattr(torch, dtype))
        if type(self) not in self.backends:
            folder = Path(tempfile.mkdtemp(prefix="verl-conformance-"))
            self.trainer.save_pretrained(folder / "model")
            settings = EngineSettings(
                model_path=str(folder / "model"),
                device=self.device,
                dtype=dtype,
                max_model_len=CONTEXT,
                max_num_seqs=4,
                tensor_parallel=self.tensor_parallel,
                gpu_memory_utilization=0.3,
                extra=self.extra,
            )
            backend = Shared(
                self.adapter,
                settings,
                log=folder / "engine.log",
                bucket_bytes=50_000,
                environment={**os.environ, "PYTHONPATH": with_tests_folder(), **self.environment},
            )
            self.backends[type(self)] = backend
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            atexit.register(super(Shared, backend).close)

    @classmethod
    def version(cls) -> str:
        (distribution,) = filter(installed, cls.adapter.distributions)
        return f"{cls.adapter.title} {importlib.metadata.version(distribution)}"

    @property
    def backend(self) -> Shared:
        return self.backends[type(self)]

    def build(self, max_num_seqs: int = 8, tokenizer: bool = True, weights: bool = True) -> ClientEngine:
        engine = ClientEngine(
            self.backend,
            self.tokenizer if tokenizer else None,
            eos_token_ids=[EOS],
            max_model_len=CONTEXT,
            vocab_size=VOCABULARY,
            no_weights="it has not been given any weights",
        )
        self.backend.under_test = engine
        if weights:
            asyncio.run(engine.update_weights(self.trainer.named_parameters(), version=0))
        return engine

    def slots(self, asked: int) -> int:
        return self.backend.settings.max_num_seqs

    async def generate_some(self) -> None:
        """Until the engine has drawn a few tokens of what is running."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if self.backend.process.call("tokens_under_way") >= 5:
                return
            await asyncio.sleep(0.005)

    def done(self) -> None:
        engine = self.backend.under_test
        if engine is not None and self.backend.process.death is None:
            asyncio.run(engine.abort())
            if self.backend.capabilities.sleep - engine._state.awake:
                asyncio.run(engine.wake(sorted(self.backend.capabilities.sleep - engine._state.awake)))


class SGLangKit(OwnProcessKit):
    engine, adapter = "sglang", SGLANG
    extra: ClassVar[dict[str, Any]] = {"forward_hooks": slow_sglang.FORWARD_HOOKS}
    environment: ClassVar[dict[str, str]] = {"SGLANG_FORCE_STREAM_INTERVAL": "4"}  # so that draw_some can look on


class SGLangTP2Kit(SGLangKit):
    how = "2"
    tensor_parallel = 2


class VLLMKit(OwnProcessKit):
    engine, adapter = "vllm", VLLM
    extra: ClassVar[dict[str, Any]] = {"worker_extension_cls": "slow_vllm.Worker"}

    def same(self, result: Result, other: Result) -> bool:
        """Its prefix cache changes the last bits of log-probs, which are compared with the trainer's everywhere."""
        return result.response_ids == other.response_ids and result.finish_reason == other.finish_reason


class VLLMTP2Kit(VLLMKit):
    how = "2"
    tensor_parallel = 2


KITS: dict[str, type[HFKit]] = {"hf": HFKit, "hf on a rank": HFOnARankKit}
for own_process in (SGLangKit, SGLangTP2Kit, VLLMKit, VLLMTP2Kit):
    room = own_process.device == "cpu" or torch.cuda.device_count() >= own_process.tensor_parallel
    if own_process.adapter.installed and room:
        size = f", tp {own_process.tensor_parallel}" if own_process.tensor_parallel > 1 else ""
        KITS[f"{own_process.adapter.name}{size}"] = own_process


@pytest.fixture(params=KITS)
def kit(request: pytest.FixtureRequest) -> Iterator[HFKit]:
    kit = KITS[request.param]()
    yield kit
    kit.done()


@pytest.fixture
def holder(kit: HFKit) -> HFKit:
    """A kit of an engine that has a copy of the weights."""
    if not kit.build().capabilities.holds_weights:
        pytest.skip("reads the trainer's weights")
    return kit


# ---- records (see records.py)

RECORDED: dict[str, records.Record] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="keep what the conformance suite finds, if nothing fails")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Notes what a test found, or compares it with the record."""
    report = yield
    name = item.callspec.params.get("kit") if isinstance(item, pytest.Function) and hasattr(item, "callspec") else None
    if name is None or report.failed or (report.when != "call" and not report.skipped):
        return report
    kit, test = KITS[name], item.originalname
    found = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else records.HOLDS
    if item.config.getoption("--record", False):
        RECORDED.setdefault(name, records.Record(kit.engine, kit.version(), kit.how)).found[test] = found
    elif kit.device == "cpu" and (kept := records.read(records.path_of(name)).found.get(test)) != found:
        report.outcome = "failed"
        report.longrepr = f"the record of {name!r} says {kept!r}, and this run {found!r}; see {records.__file__}"
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    for name, record in RECORDED.items():
        if not session.testsfailed:
            records.write(record, records.path_of(name))
