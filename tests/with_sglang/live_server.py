"""A real SGLang server on the CPU, in a process group of its own, with a pause at each token."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import slow_sglang
from helpers import with_tests_folder

START_TIMEOUT = 300.0
LAUNCHER = Path(__file__).with_name("forking_server.py")  # not imported: SGLang changes the environment


def free_port() -> int:
    """SGLang also wants the port that is 10000 further on."""
    with contextlib.ExitStack() as tried:
        while True:
            free = tried.enter_context(socket.socket())
            free.bind(("127.0.0.1", 0))
            if (port := free.getsockname()[1]) <= 55535:
                return port


class Server:
    """One SGLang server, which may be killed and started again at the same port."""

    def __init__(self, model: Path, key: str, log: Path):
        self.port = free_port()
        self._model, self._key, self._log = model, key, log
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        options = {
            "model-path": self._model,
            "host": "127.0.0.1",
            "port": self.port,
            "api-key": self._key,
            "device": "cpu",
            "dtype": "float32",
            "attention-backend": "torch_native",
            "sampling-backend": "pytorch",
            "grammar-backend": "none",
            "max-total-tokens": 8192,
            "max-running-requests": 8,
            "forward-hooks": json.dumps(slow_sglang.FORWARD_HOOKS),
        }
        command = [sys.executable, str(LAUNCHER), "--skip-tokenizer-init"]
        command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        environment = {**os.environ, "SGLANG_USE_CPU_ENGINE": "1", "OMP_WAIT_POLICY": "passive"}
        environment["PYTHONPATH"] = with_tests_folder()
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )

    def wait(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while "The server is fired up" not in self._log.read_text().rpartition("server_args=")[2]:
            self.assert_running()
            assert time.monotonic() < deadline, self._log.read_text()[-3000:]
            time.sleep(0.2)

    def assert_running(self) -> None:
        assert self._process.poll() is None, self._log.read_text()[-5000:]

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
