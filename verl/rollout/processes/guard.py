"""Waits in an engine process's group for its leader's end, and ends the group: when the trainer is killed, the system
ends the engine process at once, which then can do nothing about what it had started.

Run by its path with the leader's pid, and with nothing imported, as it stays for as long as the engine does.
"""

import contextlib
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with(parent: int, sign: int) -> bool:
    """Have this signal sent to us when the parent ends, however it does. False where it already has."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, sign)
    return os.getppid() == parent


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if die_with(int(sys.argv[1]), signal.SIGTERM):
        signal.sigwait({signal.SIGTERM})
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
