"""The teacher's signal of coming batches, made while the present one is trained on."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from sadkern.data import inputs_of
from sadkern.sides import Side, tensors_of
from sadkern.teacher.source import TeacherSource

SIGNAL = "teacher"  # a batch's entry for its signal in the making


class Ahead:
    """Runs a source in a thread of its own, `depth` batches before they are needed.

    Whatever the source waits for (another device, a disk, a server) happens beside the student's
    step. On CUDA its work is queued on a stream of its own. No more than `depth` signals that
    nobody has taken yet exist at a time. Calling it asks the source at once.

    >>> import torch
    >>> from sadkern.teacher.ahead import Ahead
    >>> def source(rows, **inputs):
    ...     return inputs["input_ids"].flatten()[rows, None].float()
    >>> batches = [{"rows": torch.tensor([0]), "input_ids": torch.tensor([[i]])} for i in (5, 7)]
    >>> ahead = Ahead(source, depth=1)
    >>> [batch["teacher"].result().item() for batch in ahead.over(iter(batches))]
    [5.0, 7.0]
    >>> ahead.close()
    """

    def __init__(self, source: TeacherSource, depth: int):
        self.source, self.depth = source, depth
        self._one_at_a_time = threading.Lock()
        self._run: Run | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __call__(self, batch: dict[str, Any]) -> Side:
        """The signal of a batch, now."""
        with self._one_at_a_time:
            return self.source(batch["rows"], **inputs_of(batch))

    def over(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches, each with a `Signal` that is in the making; `depth` of them are drawn
        before the first is given."""
        waiting: deque[dict[str, Any]] = deque()
        for batch in batches:
            waiting.append({**batch, SIGNAL: self._begin(batch)})
            if len(waiting) > self.depth:
                yield waiting.popleft()
        yield from waiting

    def close(self) -> None:
        """Drops what was begun; it can be used again after that."""
        if self._run is not None:
            self._run.close()
            self._run = None

    def _begin(self, batch: dict[str, Any]) -> Signal:
        if self._run is None:
            self._run = Run(self.depth)
        device = batch["rows"].device
        ready = torch.cuda.Event() if device.type == "cuda" else None
        if ready is not None:
            ready.record(torch.cuda.current_stream(device))
        run = self._run
        return Signal(run, run.pool.submit(self._make, run, batch, device, ready))

    def _make(
        self, run: Run, batch: dict[str, Any], device: torch.device, ready: Any
    ) -> tuple[Side, Any] | None:
        if not run.enter():
            return None
        if ready is None:
            return self(batch), None
        # One for all batches: what a stream has freed is kept for that stream alone.
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            side = self(batch)
            for x in batch.values():
                if isinstance(x, Tensor) and x.is_cuda:
                    x.record_stream(stream)
            done = torch.cuda.Event()
            done.record(stream)
        return side, done


class Run:
    """From the first signal that is begun to the closing: a thread, and room for `depth` signals
    that nobody has taken. What is taken later makes room in no other run."""

    def __init__(self, depth: int):
        # A new thread would take as many for its own arithmetic as the machine has.
        threads = (torch.get_num_threads(),)
        self.pool = ThreadPoolExecutor(1, "teacher", torch.set_num_threads, threads)
        self.room = threading.Semaphore(depth)
        self.closed = False

    def enter(self) -> bool:
        """Waits for room; False: closed, and there is nothing to wait for."""
        if not self.closed:
            self.room.acquire()
        return not self.closed

    def close(self) -> None:
        self.closed = True
        self.room.release()  # the thread may be waiting for some
        self.pool.shutdown(cancel_futures=True)


class Signal:
    """A signal that is being made."""

    def __init__(self, run: Run, future: Future[tuple[Side, Any] | None]):
        self._run, self._future = run, future

    def result(self) -> Side:
        """Waits for it. Whatever the source raised is raised here; RuntimeError: it was dropped."""
        try:
            found = self._future.result()
        except CancelledError:
            found = None
        finally:
            self._run.room.release()
        if found is None:
            raise RuntimeError("the teacher was closed while a batch was waiting for it")
        side, done = found
        if done is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(done)
            for tensor in tensors_of(side).values():
                tensor.record_stream(stream)
        return side
