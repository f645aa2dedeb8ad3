"""An environment in a process of its own: one that hangs, or takes its process down, costs an
episode and no more."""

from __future__ import annotations

import atexit
import multiprocessing
import pickle
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from sadkern.evaluate.environments import Environment, Outcome

TIMEOUT = 120.0  # seconds; a game of many objects takes some to begin
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


class Isolated:
    """`make`, which has to be picklable, is called there. TimeoutError: it has not answered within
    `timeout` seconds. RuntimeError: its process is gone. What it raises is raised here."""

    def __init__(
        self, name: str, task: str, make: Callable[[], Environment], timeout: float = TIMEOUT
    ):
        self.name, self.task, self.make, self.timeout = name, task, make, timeout
        self._worker: _Worker | None = None

    def reset(self) -> str:
        if self._worker is None:
            self._worker = _idle.pop() if _idle else _Worker()
            self._ask("make", self.make)
        return self._ask("reset")

    def step(self, action: str) -> Outcome:
        return self._ask("step", action)

    def close(self) -> None:
        if self._worker is not None:
            self._ask("close")
            _idle.append(self._worker)
            self._worker = None

    def _ask(self, *asked: Any) -> Any:
        if self._worker is None:
            raise RuntimeError(f"{self.name} is not there any more: expected reset() first")
        try:
            fine, said = self._worker.ask(asked, self.timeout)
        except (TimeoutError, RuntimeError):
            self._worker.end()
            self._worker = None
            raise
        if not fine:
            raise said
        return said


class _Worker:
    def __init__(self) -> None:
        context: Any = multiprocessing.get_context(METHOD)
        if METHOD == "forkserver":
            context.set_forkserver_preload([__name__])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, asked: tuple[Any, ...], timeout: float) -> tuple[bool, Any]:
        try:
            self.connection.send(asked)
            if self.connection.poll(timeout):
                return self.connection.recv()
        except (EOFError, OSError):
            self.process.join(1.0)
            raise RuntimeError(
                f"its process is gone (exit status {self.process.exitcode})"
            ) from None
        raise TimeoutError(f"{asked[0]}: no answer within {timeout:g} s")

    def end(self) -> None:
        self.process.kill()
        self.connection.close()


_idle: list[_Worker] = []


@atexit.register
def _end_all() -> None:
    while _idle:
        _idle.pop().end()


def _serve(connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that asks
    env: Any = None
    while True:
        try:
            kind, *given = connection.recv()
        except EOFError:
            return
        try:
            if kind == "make":
                env, said = given[0](), None
            else:
                said = getattr(env, kind)(*given)
            connection.send((True, said))
        except Exception as error:
            connection.send((False, _sendable(error)))


def _sendable(error: Exception) -> Exception:
    """As it is, or where it cannot be pickled what it says."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
