"""A store that was killed again and again while it was made is that of a run that was not."""

from __future__ import annotations

import itertools
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from filling import examples, fill
from forked import FORKED

from sadkern.store import Store, content_key
from sadkern.store.care import verify

KILLS = {"topk": 34, "sampled": 8, "hidden": 8}  # fifty
HUNG = 300.0  # seconds


def start(*arguments) -> BaseProcess:
    """Filling a store."""
    process = FORKED.Process(target=fill, args=arguments)
    process.start()
    return process


def ended(process: BaseProcess, kill_after: float = HUNG) -> bool:
    """Whether it came to its end and was not killed."""
    process.join(kill_after)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


def filled(*arguments, **options) -> bool:
    return ended(start(*arguments), **options)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("mode", KILLS)
def test_killed_at_random_moments_the_store_is_the_same(tmp_path, mode):
    whole = tmp_path / "whole"
    for folder in (tmp_path / "first", whole):  # the first waits for all to be imported
        began = time.monotonic()
        assert filled(str(folder), mode)
        took = time.monotonic() - began
    expected = content(whole)
    wanted = {content_key(example["input_ids"]) for example in examples()}
    assert set(Store.open(whole)) == wanted
    assert len(Store.open(whole).manifest["shards"]) > 4

    rng = random.Random(mode)
    kills = stores = 0
    longest = took
    while kills < KILLS[mode]:
        folder = tmp_path / f"killed{stores}"
        while not filled(str(folder), mode, kill_after=rng.uniform(0, longest)):
            kills += folder.exists() and len(content(folder)) > 0  # and not before it had begun
            longest *= 1.1  # the machine may have become slower than it was when `took` was taken
        longest = max(took, longest / 2)
        stores += 1
        assert content(folder) == expected
        assert verify(folder) == []


def test_killed_before_any_operation_on_a_file_the_store_is_the_same(tmp_path):
    """Two shards of several parts; the same, whatever of them was on disk."""
    few = "topk", 0, 1, 8
    whole = tmp_path / "whole"
    assert filled(str(whole), *few)
    names = list(Store.open(whole).manifest["shards"])
    assert len(names) > 1
    assert any(name[0].isdigit() for name in names)  # as the parts' do
    for last in itertools.count():
        folder = tmp_path / f"killed{last}"
        whole_at_once = filled(str(folder), *few, last)
        assert whole_at_once or filled(str(folder), *few)
        assert content(folder) == content(whole)
        assert verify(folder) == []
        if whole_at_once:
            break
    assert last > 60  # kills


@pytest.mark.parametrize("mode", ["topk", "hidden"])
def test_several_processes_share_the_work_and_outlive_a_killed_one(tmp_path, mode):
    """Whichever takes which shard, each is made once and by one of them."""
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    assert filled(str(whole), mode)
    rng = random.Random(0)
    for _ in range(3):
        first, *others = [start(str(shared), mode, rank, 3) for rank in range(3)]
        ended(first, kill_after=rng.uniform(0.05, 0.3))
        for other in others:
            assert ended(other)
    assert filled(str(shared), mode)
    assert verify(shared) == []
    assert content(shared) == content(whole)
