"""A language model behind an OpenAI-compatible API that is asked for each response's score.

Asking is waiting: it happens in one thread of the run's own process, many questions at a time, not in the processes
that run scorers.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import sqlite3
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from verl.errors import UserError
from verl.reward.judge import TEMPLATE, fill
from verl.reward.pool import Outcome

if TYPE_CHECKING:
    from verl.config.sections.models import JudgeConfig

PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # statuses that may be better the next time
LONGEST_WAIT = 60.0  # seconds between two tries


class NoAnswerError(Exception):
    """No score came of a try. final: nor would it of another one. wait: seconds that the server asks to wait."""

    def __init__(self, why: str, *, final: bool = False, wait: float | None = None):
        super().__init__(why)
        self.final, self.wait = final, wait


class Judge:
    """Asks in the order in which samples come, up to ``concurrency`` at a time; answers are kept in ``cache``.
    UserError for a cache that cannot be used."""

    def __init__(self, config: JudgeConfig):
        self._config = config
        self._key = os.environ[config.api_key_env] if config.api_key_env else None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="judge", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        except (OSError, sqlite3.Error) as error:
            self._stop()
            raise UserError(f"reward.judge.cache={config.cache} cannot be used: {error}") from error

    async def _open(self) -> None:
        config = self._config
        self._cache = Cache(Path(config.cache).expanduser()) if config.cache else None
        self._client = httpx.AsyncClient(
            timeout=config.timeout,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            limits=httpx.Limits(max_connections=config.concurrency),
        )
        self._free = asyncio.Semaphore(config.concurrency)

    def submit(self, sample: Mapping[str, Any]) -> Future[Outcome]:
        """sample: prompt (JSON list of messages), solution_str, ground_truth. The outcome's value is as a scorer's."""
        return asyncio.run_coroutine_threadsafe(self._outcome(sample), self._loop)

    async def _outcome(self, sample: Mapping[str, Any]) -> Outcome:
        question = fill(self._config.template or TEMPLATE, sample)
        async with self._free:
            begun = time.monotonic()
            try:
                number, text = await self._answer(question)
            except NoAnswerError as error:
                return Outcome(
                    failure="error",
                    detail=f"reward.judge.url={self._config.url}: {error}",
                    fatal=self._config.on_failure == "error",
                    begun=begun,
                    ended=time.monotonic(),
                )
        value = number, json.dumps({"judge": text}, ensure_ascii=False)
        return Outcome(value, begun=begun, ended=time.monotonic())

    async def _answer(self, question: str) -> tuple[float, str]:
        """The number and the text that it stands in, from the cache or after as many tries as it may take."""
        config = self._config
        body = {
            "model": config.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
        }
        if self._cache and (known := self._cache.get(body)) is not None:
            with suppress(NoAnswerError):  # where the pattern or the range has changed since
                return self._number(known), known
        for tried in range(config.retries + 1):
            try:
                text = await self._ask(body)
                number = self._number(text)
                break
            except NoAnswerError as error:
                if error.final:
                    raise
                if tried == config.retries:
                    raise NoAnswerError(f"{error} (tried {tried + 1} times)") from error
                wait = config.backoff * 2**tried if error.wait is None else error.wait
                await asyncio.sleep(min(wait, LONGEST_WAIT))
        if self._cache:
            self._cache.put(body, text)
        return number, text

    async def _ask(self, body: dict[str, Any]) -> str:
        url = f"{str(self._config.url).rstrip('/')}/chat/completions"
        try:
            async with asyncio.timeout(self._config.timeout):
                answer = await self._client.post(url, json=body)
        except TimeoutError as error:
            raise NoAnswerError(f"no answer within {self._config.timeout:g} s") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise NoAnswerError(f"{type(error).__name__} {error}".strip()) from error
        if answer.status_code != 200:
            said = self._without_key(answer.text.strip()[:300])
            wait = answer.headers.get("retry-after", "")
            raise NoAnswerError(
                f"status {answer.status_code} {said}".strip(),
                final=answer.status_code not in PASSING,
                wait=float(wait) if wait.isdigit() else None,
            )
        try:
            text = answer.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise NoAnswerError(f"not a chat completion: {self._without_key(answer.text[:300])!r}") from error
        if not isinstance(text, str):
            raise NoAnswerError("the answer has no text")
        return text

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _number(self, text: str) -> float:
        config = self._config
        found = re.findall(config.pattern, text)
        if not found:
            raise NoAnswerError(f"no number in the answer (reward.judge.pattern): {text.strip()[-200:]!r}")
        try:
            number = float(found[-1])
        except ValueError as error:
            raise NoAnswerError(f"{found[-1]!r} is not a number (reward.judge.pattern)") from error
        if not config.lowest <= number <= config.highest:
            raise NoAnswerError(
                f"{number:g} is not from {config.lowest:g} to {config.highest:g} (reward.judge.lowest ...)"
            )
        return number

    def close(self) -> None:
        """Questions under way are dropped, and their futures cancelled."""
        if not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result()
        self._stop()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _shut(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()
        if self._cache:
            self._cache.close()


class Cache:
    """Answers by what was asked (model, prompt, sampling), in a SQLite file that several runs may share."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._base = sqlite3.connect(path, timeout=60)
        with self._base:
            self._base.execute("CREATE TABLE IF NOT EXISTS answers (question TEXT PRIMARY KEY, answer TEXT NOT NULL)")

    def get(self, body: dict[str, Any]) -> str | None:
        row = self._base.execute("SELECT answer FROM answers WHERE question = ?", (self._id(body),)).fetchone()
        return row[0] if row else None

    def put(self, body: dict[str, Any], answer: str) -> None:
        with self._base:
            self._base.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (self._id(body), answer))

    @staticmethod
    def _id(body: dict[str, Any]) -> str:
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

    def close(self) -> None:
        self._base.close()
