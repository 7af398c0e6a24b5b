"""HTTP with one SGLang server: requests from an event loop in a thread of its own, and what its answers mean."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import httpx

from verl.errors import UserError
from verl.rollout.client.backend import EngineDied

CONNECT_TIMEOUT = 10.0  # seconds
ANSWER_TIMEOUT = 60.0  # of orders that do no work on weights
# The scheduler answers it, and draws nothing for it. /health draws a token wherever nothing else is drawn: an order to
# load weights or to sleep that comes just then ends SGLang, which asserts that it is idle.
SIGN_OF_LIFE = "/server_info"

Answer = TypeVar("Answer")


class Unreachable(EngineDied):
    """No answer came, or it broke off. refused: nothing listens there."""

    def __init__(self, text: str, refused: bool):
        super().__init__(text)
        self.refused = refused


class Refused(UserError):  # noqa: N818
    """The server answered, and not with what was asked for."""

    def __init__(self, text: str, status: int):
        super().__init__(text)
        self.status = status


class ServerAPI:
    """key: sent as a bearer token; never part of a message. key_setting: the setting that says where it is from."""

    def __init__(self, url: str, key: str | None, key_setting: str):
        self.url, self._key_setting, self.has_key = url.rstrip("/"), key_setting, key is not None
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=f"SGLang server {self.url}", daemon=True)
        self._thread.start()
        # A connection each: a kept one may be closed by the server just as the next request goes out.
        self.client = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key is not None else {},
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            trust_env=False,  # no proxy
            verify=ssl.create_default_context() if self.url.startswith("https:") else True,
        )

    def call(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """From any other thread: the result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def get(self, path: str, timeout: float = ANSWER_TIMEOUT) -> Any:
        return await self._ask("GET", path, timeout)

    async def open_to_anybody(self, path: str) -> bool:
        """Whether it answers without the key."""
        try:
            await self._ask("GET", path, ANSWER_TIMEOUT, headers={"Authorization": ""})
        except Refused:
            return False
        return True

    async def post(self, path: str, body: Any, timeout: float | None = ANSWER_TIMEOUT) -> Any:
        """body: something for JSON, or its bytes."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self._ask("POST", path, timeout, content=content, headers={"Content-Type": "application/json"})

    async def _ask(self, method: str, path: str, timeout: float | None, **options: Any) -> Any:
        try:
            async with asyncio.timeout(timeout):
                response = await self.client.request(method, path, **options)
        except TimeoutError:
            raise Unreachable(f"{self.url}{path} did not answer within {timeout:.0f} s", refused=False) from None
        except httpx.HTTPError as error:
            raise self.unreachable(path, error) from None
        self.check(path, response.status_code, response.content)
        return _parsed(response.content)

    def unreachable(self, path: str, error: httpx.HTTPError) -> Unreachable:
        if isinstance(error, httpx.ConnectTimeout):  # it, or this process, has too much to do; or its machine is gone
            return Unreachable(f"{self.url}{path} took no connection within {CONNECT_TIMEOUT:g} s", refused=False)
        refused = isinstance(error, httpx.ConnectError)
        what = "cannot be reached" if refused else "broke off the connection"
        return Unreachable(f"{self.url}{path} {what}: {str(error) or type(error).__name__}", refused)

    def check(self, path: str, status: int, content: bytes) -> None:
        """Raises for anything but success."""
        if status < 300:
            return
        if status in (401, 403):
            sent = "refuses the key" if self.has_key else "wants a key"
            raise Refused(
                f"the SGLang server {sent}: {self.url}{path} answered {status}. Set {self._key_setting} to the name "
                "of an environment variable that holds what the server was started with as --api-key",
                status,
            )
        raise Refused(f"{self.url}{path} answered {status}: {_message(content)}", status)

    def close(self) -> None:
        if self._thread.is_alive():
            self.call(self._leave())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()

    async def _leave(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.client.aclose()


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content.decode(errors="replace")


def _message(content: bytes) -> str:
    """Of an error answer, which SGLang writes in one of several ways."""
    found = _parsed(content)
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and name in found:
            found = found[name]
    return (found if isinstance(found, str) else json.dumps(found))[:2000].strip() or "(nothing)"
