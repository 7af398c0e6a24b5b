"""Asks a language model behind an OpenAI-compatible API for the score of each response.

One thread of the run's own process sends all questions, many at a time. The processes that run scorers take no part.
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

from verl.errors import UserError
from verl.reward.judge import TEMPLATE, fill
from verl.reward.pool import CallResult

if TYPE_CHECKING:
    from verl.config.sections.models import JudgeConfig

TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # statuses after which the next try may succeed
LONGEST_WAIT = 60.0  # seconds between two tries


class NoAnswerError(Exception):
    """A try gave no score. final: another try would fail as well. wait: seconds to wait, as the server asked."""

    def __init__(self, why: str, *, final: bool = False, wait: float | None = None):
        super().__init__(why)
        self.final, self.wait = final, wait


class Judge:
    """Sends questions in the order of ``submit``, at most ``concurrency`` at a time. Keeps answers in ``cache``.

    Raises UserError if the cache cannot be used."""

    def __init__(self, config: JudgeConfig):
        self._config = config
        self._key = os.environ[config.api_key_env] if config.api_key_env else ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="judge", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        except (OSError, sqlite3.Error) as error:
            self._stop()
            raise UserError(f"reward.judge.cache={config.cache} cannot be used: {error}") from error

    async def _open(self) -> None:
        from openai import AsyncOpenAI, Omit  # the import takes two seconds, and few runs have a judge

        config = self._config
        self._cache = Cache(Path(config.cache).expanduser()) if config.cache else None
        # The client's own retries have a fixed backoff and do not cover answers without a score.
        self._client = AsyncOpenAI(
            base_url=config.url,
            api_key=self._key or "none",  # else the client takes OPENAI_API_KEY, which may belong to another service
            timeout=config.timeout,
            max_retries=0,
        )
        self._headers: Any = {} if self._key else {"Authorization": Omit()}
        self._slots = asyncio.Semaphore(config.concurrency)

    def submit(self, sample: Mapping[str, Any]) -> Future[CallResult]:
        """Future of the result, whose value is that of a scorer. sample: prompt (JSON list of messages), solution_str,
        ground_truth."""
        return asyncio.run_coroutine_threadsafe(self._result(sample), self._loop)

    async def _result(self, sample: Mapping[str, Any]) -> CallResult:
        question = fill(self._config.template or TEMPLATE, sample)
        async with self._slots:
            begun = time.monotonic()
            try:
                number, text = await self._answer(question)
            except NoAnswerError as error:
                return CallResult(
                    failure="error",
                    detail=f"reward.judge.url={self._config.url}: {error}",
                    fatal=self._config.on_failure == "error",
                    begun=begun,
                    ended=time.monotonic(),
                )
        value = number, json.dumps({"judge": text}, ensure_ascii=False)
        return CallResult(value, begun=begun, ended=time.monotonic())

    async def _answer(self, question: str) -> tuple[float, str]:
        """The score and the whole answer, from the cache or from the model after at most ``retries`` further tries."""
        config = self._config
        body = {
            "model": config.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
        }
        if self._cache and (known := self._cache.get(body)) is not None:
            with suppress(NoAnswerError):  # the pattern or the range may have changed since
                return self._score(known), known
        for tried in range(config.retries + 1):
            try:
                text = await self._ask(body)
                score = self._score(text)
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
        return score, text

    async def _ask(self, body: dict[str, Any]) -> str:
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        try:
            async with asyncio.timeout(self._config.timeout):  # of the whole answer; the client's is that of each read
                completion = await self._client.chat.completions.create(**body, extra_headers=self._headers)
        except (TimeoutError, APITimeoutError) as error:
            raise NoAnswerError(f"no answer within {self._config.timeout:g} s") from error
        except APIConnectionError as error:
            raise NoAnswerError(f"{type(error.__cause__).__name__} {error.__cause__ or error}") from error
        except APIStatusError as error:
            wait = error.response.headers.get("retry-after", "")
            raise NoAnswerError(
                f"status {error.status_code} {self._shortened(error.response.text)}".strip(),
                final=error.status_code not in TRANSIENT,
                wait=float(wait) if wait.isdigit() else None,
            ) from error
        except ValueError as error:
            raise NoAnswerError(f"the answer is not JSON: {self._shortened(str(error))}") from error
        try:
            text = completion.choices[0].message.content
        except (AttributeError, LookupError, TypeError) as error:  # the client does not check that fields exist
            raise NoAnswerError(f"the answer is not a chat completion: {self._shortened(str(completion))}") from error
        if not isinstance(text, str):
            raise NoAnswerError("the answer has no text")
        return text

    def _shortened(self, text: str) -> str:
        """The start of the text, without the API key."""
        text = text.strip()[:300]
        return text.replace(self._key, "***") if self._key else text

    def _score(self, text: str) -> float:
        config = self._config
        found = re.findall(config.pattern, text)
        if not found:
            raise NoAnswerError(f"reward.judge.pattern finds no number in the answer: {text.strip()[-200:]!r}")
        try:
            number = float(found[-1])
        except ValueError as error:
            raise NoAnswerError(f"reward.judge.pattern finds {found[-1]!r}, which is not a number") from error
        if not config.lowest <= number <= config.highest:
            raise NoAnswerError(
                f"the score {number:g} is outside reward.judge.lowest={config.lowest:g} to highest={config.highest:g}"
            )
        return number

    def close(self) -> None:
        """Cancel all pending questions and their futures. A second call has no effect."""
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
        await self._client.close()
        if self._cache:
            self._cache.close()


class Cache:
    """Answers by request body (model, prompt, sampling), in a SQLite file that several runs may share."""

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
