"""An environment in a process of its own: whatever it does, one episode fails, by name."""

from __future__ import annotations

from functools import partial

import pytest
from fragile import Fragile

from sadkern.evaluate.environments.isolated import Isolated
from sadkern.evaluate.play import Move, Running, play_together


def moves(episodes):
    return [Move("", "on") for _ in episodes]


def test_faults_end_an_episode_and_not_the_run():
    hows = [
        "works", "hangs", "dies", "raises", "raises what cannot be sent", "never begins",
        "does not close", "works",
    ]  # fmt: skip
    envs = []

    def begun():
        for number, how in enumerate(hows):
            # Where something may take its time it is given some.
            timeout = 1.0 if how == "hangs" else 120.0
            envs.append(Isolated("fragile", f"{number}", partial(Fragile, how), timeout))
            if how == "hangs":
                envs[-1].timeout = 120.0
                running = Running(envs[-1])
                envs[-1].timeout = 1.0
                yield running
            else:
                yield Running(envs[-1])

    found = {one.task: one for one in play_together(begun(), moves, 3)}
    assert [found[f"{number}"].failure for number in range(len(hows))] == [
        "",
        "TimeoutError: step: no answer within 1 s",
        "RuntimeError: its process is gone (exit status 3)",
        "OSError: the engine is gone",
        "RuntimeError: Unpicklable: a fault in the engine",
        "ValueError: no such game",
        "",
        "",
    ]
    assert [one.success for one in found.values()].count(True) == 3
    (turn,) = found["0"].turns
    assert turn.observation == "on 1"
    assert found["0"].facts == {"n": 1}
    # Another process than this one, and used again once it is free.
    pids = {one.opening for one in found.values() if one.opening}
    assert len(pids) < len(hows) - 1
    with pytest.raises(RuntimeError, match="fragile is not there any more"):
        envs[0].step("on")
