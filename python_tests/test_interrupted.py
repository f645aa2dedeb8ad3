"""A store that was killed again and again while it was made is that of a run that was not."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import caching_child
import pytest

from sadkern.store import Store, content_key
from sadkern.store.care import verify

KILLS = 50
HUNG = 300.0  # seconds


class Worker:
    """Fills stores one after another, each in a process of its own that starts at once."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, caching_child.__file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def start(self, *arguments, kill_after=HUNG):
        self.process.stdin.write(json.dumps(arguments) + "\n")
        self.process.stdin.flush()
        self.child = int(self.process.stdout.readline())
        self.timer = threading.Timer(kill_after, self.kill)
        self.timer.start()

    def join(self) -> bool:
        """Whether it came to its end and was not killed."""
        status = int(self.process.stdout.readline())
        self.timer.cancel()
        assert status in (0, signal.SIGKILL)
        return status == 0

    def run(self, *arguments, **options) -> bool:
        self.start(*arguments, **options)
        return self.join()

    def kill(self):
        with suppress(ProcessLookupError):  # it has come to its end
            os.kill(self.child, signal.SIGKILL)


@pytest.fixture(scope="module")
def workers():
    made = [Worker() for _ in range(3)]
    yield made
    for worker in made:
        worker.process.stdin.close()
        worker.process.wait()
        worker.process.stdout.close()


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("mode", ["topk", "sampled", "hidden"])
def test_killed_at_random_moments_the_store_is_the_same(tmp_path, workers, mode):
    whole = tmp_path / "whole"
    worker = workers[0]
    for folder in (tmp_path / "first", whole):  # the first waits for all to be imported
        began = time.monotonic()
        assert worker.run(str(folder), mode)
        took = time.monotonic() - began
    expected = content(whole)
    wanted = {content_key(example["input_ids"]) for example in caching_child.examples()}
    assert set(Store.open(whole)) == wanted
    assert len(Store.open(whole).manifest["shards"]) > 4

    rng = random.Random(mode)
    kills = stores = 0
    longest = took
    while kills < (KILLS if mode == "topk" else 8):
        folder = tmp_path / f"killed{stores}"
        while not worker.run(str(folder), mode, kill_after=rng.uniform(0, longest)):
            kills += folder.exists() and len(content(folder)) > 0  # and not before it had begun
            longest *= 1.1  # the machine may have become slower than it was when `took` was taken
        longest = max(took, longest / 2)
        stores += 1
        assert content(folder) == expected
        assert verify(folder) == []


def test_killed_before_any_operation_on_a_file_the_store_is_the_same(tmp_path, workers):
    """Two shards of several parts; the same, whatever of them was on disk."""
    worker, few = workers[0], ("topk", 0, 1, 8)
    whole = tmp_path / "whole"
    assert worker.run(str(whole), *few)
    names = list(Store.open(whole).manifest["shards"])
    assert len(names) > 1
    assert any(name[0].isdigit() for name in names)  # as the parts' do
    for last in itertools.count():
        folder = tmp_path / f"killed{last}"
        whole_at_once = worker.run(str(folder), *few, last)
        assert whole_at_once or worker.run(str(folder), *few)
        assert content(folder) == content(whole)
        assert verify(folder) == []
        if whole_at_once:
            break
    assert last > 60  # kills


@pytest.mark.parametrize("mode", ["topk", "hidden"])
def test_several_processes_share_the_work_and_outlive_a_killed_one(tmp_path, workers, mode):
    """Whichever takes which shard, each is made once and by one of them."""
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    assert workers[0].run(str(whole), mode)
    rng = random.Random(0)
    for _ in range(3):
        for rank, worker in enumerate(workers):
            worker.start(str(shared), mode, rank, 3)
        time.sleep(rng.uniform(0.05, 0.3))
        workers[0].kill()
        for worker in workers:
            worker.join()
    assert workers[0].run(str(shared), mode)
    assert verify(shared) == []
    assert content(shared) == content(whole)
