"""The rollout engine of ``rollout.mode=server``: SGLang servers that were started elsewhere, behind one router."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from verl.errors import UserError
from verl.rollout.client.engine import NO_WEIGHTS, ClientEngine
from verl.rollout.engines.sglang.http_backend import KEY_SETTING, SGLangServer, Times
from verl.rollout.router.router import Replica, Router
from verl.rollout.weights.disk import WeightFolder

if TYPE_CHECKING:
    from verl.config.sections.models import EngineConfig

URLS = "actor_rollout_ref.rollout.server_urls"


class ServerRouter(Router):
    """Closes the folder of weights, too."""

    folder: WeightFolder | None = None

    async def close(self) -> None:
        try:
            await super().close()
        finally:
            if self.folder is not None:
                self.folder.close()


def build_server_rollout(
    rollout: EngineConfig,
    model_path: Path,
    tokenizer: Any,
    eos_token_ids: Sequence[int],
    max_model_len: int,
    vocab_size: int,
    *,
    dtype: torch.dtype | None,
    bucket_bytes: int,
    weights_dir: str | None = None,
    no_weights: str | None = NO_WEIGHTS,
    note: Callable[[str], None] = lambda text: None,
    times: Times | None = None,
) -> Router:
    """All servers have to answer now. tokenizer: for stop strings. dtype: that weights are sent in; None: their own.
    weights_dir: folder through which new weights are sent; None: over HTTP. no_weights: as for ``ClientEngine``.

    note: takes what the user should know: which servers there are, which died, which are back.
    """
    key = _key(rollout.server_api_key_env)
    folder = None if weights_dir is None else WeightFolder(weights_dir, model_path, dtype)

    def connect(url: str) -> ClientEngine:
        backend = SGLangServer(
            url,
            key=key,
            folder=folder,
            bucket_bytes=bucket_bytes,
            dtype=dtype,
            end_tokens=eos_token_ids,
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            times=times,
        )
        try:
            _check_model(backend, model_path)
        except UserError:
            backend.close()
            raise
        note(backend.describe())
        return ClientEngine(
            backend,
            tokenizer,
            eos_token_ids=eos_token_ids,
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            no_weights=no_weights,
        )

    router = ServerRouter(
        _all(rollout.server_urls, connect),
        revive=connect,
        save=folder.write if folder else None,
        forget=folder.forget if folder else lambda saved: None,
        note=note,
    )
    router.folder = folder
    return router


def _all(urls: Sequence[str], connect: Callable[[str], ClientEngine]) -> list[Replica]:
    """Every server, or one error that says what is wrong with each that cannot be used."""
    with ThreadPoolExecutor(len(urls)) as pool:
        calls = [pool.submit(connect, url) for url in urls]
    problems = [call.exception() for call in calls]
    found = [error for error in problems if error is not None]
    for error in found:
        if not isinstance(error, UserError):
            raise error
    if found:
        for call in calls:
            if call.exception() is None:
                call.result().backend.close()
        raise UserError(f"{URLS}: " + "\n  ".join(str(error) for error in found))
    return [Replica(url, call.result()) for url, call in zip(urls, calls, strict=True)]


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"{KEY_SETTING}={variable}: there is no such environment variable here, or it is empty; export it with "
            "what the servers were started with as --api-key"
        )
    return key


def _check_model(backend: SGLangServer, model_path: Path) -> None:
    """That the server's model is of the actor's kind, as far as both say."""
    path = model_path / "config.json"
    if not path.is_file():
        return
    ours, theirs = json.loads(path.read_text()).get("architectures"), backend.facts.get("architectures")
    if ours and theirs and list(ours) != list(theirs):
        raise UserError(
            f"the SGLang server at {backend.url} serves a {', '.join(theirs)} ({backend.facts.get('model_path')}), and "
            f"actor_rollout_ref.model.path={model_path} is a {', '.join(ours)}: start it with that model"
        )
