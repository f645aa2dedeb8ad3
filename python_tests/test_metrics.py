"""The paper's metrics, of logs written by hand, and the log itself."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sadkern.evaluate import metrics
from sadkern.evaluate.episode import Episode, Log, Turn, read
from sadkern.evaluate.metrics import cot_match, summary
from sadkern.files import BusyError


def episode(env, task, *turns, success, reward=None, **more):
    turns = tuple(
        Turn(thought, action, "seen.", len(thought.split()), len(action.split()))
        for thought, action in turns
    )
    return Episode(env, task, turns, success, float(success if reward is None else reward), **more)


# Thought tokens are words here.
STUDENT = [
    episode("alfworld", "mug", ("the mug is near the sink", "go to sink 1"),
            ("now I take it", "take mug 1 from sink 1"), success=True),
    episode("alfworld", "soap", ("look in the cabinet", "open cabinet 1"), ("", "look"),
            success=False),
    episode("alfworld", "pan", ("", "go to stove 1"), success=False, failure="50 steps"),
    episode("alfworld", "none", success=False, failure="crash"),
    episode("hotpotqa", "q1", ("who wrote it", "Search[It]"), ("found him", "Finish[Bob]"),
            success=True),
    episode("hotpotqa", "q2", ("I know", "Finish[Eve]"), success=False),
    episode("hotpotqa", "q3", ("one two three four five", "Finish[Al]"), success=True),
    episode("webshop", "w1", ("a red one", "search[red]"), ("cheap", "click[B01]"),
            ("", "click[Buy Now]"), success=False, reward=0.5),
    episode("webshop", "w2", ("x", "click[Buy Now]"), success=True),
    episode("webshop", "w3", success=False, reward=0.25),
]  # fmt: skip
TEACHER = [
    episode("alfworld", "mug", ("the mug is near the stove", "go to  Sink 1"),
            ("I take it", "take mug 1 from sink 1"), ("done", "look"), success=True),
    episode("alfworld", "soap", ("the soap is in the cabinet", "open cabinet 1"), success=True),
    episode("hotpotqa", "q1", ("", "Finish[Bob]"), success=True),
    episode("hotpotqa", "q1", ("another try", "Search[Bob]"), success=False, sample=1),
]  # fmt: skip


def test_values_worked_out_by_hand():
    found = summary(STUDENT, TEACHER)
    assert list(found) == ["alfworld", "hotpotqa", "webshop", "all"]
    values = {env: {name: x.value for name, x in rows.items()} for env, rows in found.items()}
    assert values["alfworld"] == pytest.approx({
        "success": 1 / 4, "reward": 1 / 4,
        "reasoning tokens": (10 + 4 + 0 + 0) / 4, "steps": (4 + 3 + 1 + 0) / 4,
        # mug: the (x2) mug is near | I take it of "the mug is near the stove I take it done";
        # soap: in the cabinet of six.
        "CoT match": (8 / 10 + 3 / 6) / 2,
        "action match": (2 / 3 + 1) / 2,
    })  # fmt: skip
    assert values["hotpotqa"] == pytest.approx({
        "success": 2 / 3, "reward": 2 / 3, "reasoning tokens": (5 + 2 + 5) / 3,
        "steps": (4 + 2 + 2) / 3, "CoT match": 1.0, "action match": 0.0,
    })  # fmt: skip
    rows = values["webshop"]
    assert rows["reward"] == pytest.approx(1.75 / 3)
    assert rows["success"] == pytest.approx(1 / 3)
    assert rows["steps"] == pytest.approx((5 + 2 + 0) / 3)
    assert np.isnan(rows["CoT match"])  # the teacher was never there
    assert values["all"]["success"] == pytest.approx(4 / 10)
    assert values["all"]["action match"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert found["all"]["CoT match"].episodes == 3


def test_the_papers_own_examples():
    def lengths(*counts):
        return [Episode("e", str(n), (Turn("x", "", "", n),), True, 1.0) for n in counts]

    # Equation 10: thoughts of 12, 15 and 14 tokens.
    assert metrics.reasoning_length(lengths(12, 15, 14)).value == pytest.approx(13.67, abs=0.005)
    assert cot_match("abcdefxyz", "abcdefghi") == pytest.approx(6 / 9)
    # Equation 11: 16, 13 and 20 steps.
    many = [Episode("e", str(n), (Turn("t", "a", ""),) * (n // 2) + (Turn("", "a", ""),) * (n % 2),
                    True, 1.0) for n in (16, 13, 20)]  # fmt: skip
    assert [one.steps for one in many] == [16, 13, 20]
    assert metrics.steps(many).value == pytest.approx(16.33, abs=0.005)


def test_intervals_hold_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        found = metrics.bootstrap(rng.random(60) < 0.3, seed=seed)
        assert found.low <= found.value <= found.high
        held += found.low <= 0.3 <= found.high
    assert 0.88 < held / 200 < 0.99
    assert metrics.bootstrap([0.25] * 7)[:3] == (0.25, 0.25, 0.25)
    assert metrics.bootstrap([1, 0, 1]) == metrics.bootstrap([1, 0, 1])


def test_a_log_gives_back_what_was_written(tmp_path):
    path = tmp_path / "new" / "run.jsonl"
    with Log(path) as log:
        for one in STUDENT:
            log.append(one)
            assert list(read([path])) == log.episodes  # also while it is written
    with Log(path) as again:
        assert ("hotpotqa", "q2", 0) in again
        assert ("hotpotqa", "q2", 1) not in again
    assert STUDENT[0].text == (
        "Thought: the mug is near the sink\nAction: go to sink 1\nObservation: seen.\n"
        "Thought: now I take it\nAction: take mug 1 from sink 1\nObservation: seen.\n"
    )


def written(path, episodes):
    with Log(path) as log:
        for one in episodes:
            log.append(one)


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_line_cut_short_is_written_anew(tmp_path, cut):
    path = tmp_path / "run.jsonl"
    for one in STUDENT[:3]:
        written(path, [one])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with Log(path) as log:
        assert log.episodes == list(read([path])) == STUDENT[:2]
        assert path.read_bytes() == whole[:-cut]  # reading changes nothing
        log.append(STUDENT[2])
    assert path.read_bytes() == whole


WRONG = ["{", "[]", json.dumps({"env": "alfworld", "turns": []}), json.dumps({"messages": []})]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_line_that_is_no_episode_is_named(tmp_path, wrong):
    path = tmp_path / "run.jsonl"
    written(path, STUDENT[:2])
    lines = path.read_text().splitlines()
    for number, place in ((2, 1), (3, 2)):  # the last one too, which ends
        path.write_text("\n".join([*lines[:place], wrong, *lines[place:]]) + "\n")
        before = path.read_bytes()
        for opened in (Log, lambda path: list(read([path]))):
            with pytest.raises(ValueError, match=rf"run.jsonl, line {number}: no episode"):
                opened(path)
        assert path.read_bytes() == before
    with pytest.raises(FileNotFoundError, match=r"none.jsonl: expected a log of episodes"):
        list(read([tmp_path / "none.jsonl"]))


def test_another_file_of_json_is_not_taken_for_a_line_cut_short(tmp_path):
    path = tmp_path / "trajectories.jsonl"
    path.write_text(json.dumps({"messages": []}))  # without the end of its line
    with pytest.raises(ValueError, match=r"trajectories.jsonl, line 1: no episode"):
        Log(path)


def test_a_log_has_one_writer_at_a_time(tmp_path):
    path = tmp_path / "run.jsonl"
    with Log(path) as log:
        log.append(STUDENT[0])
        with pytest.raises(BusyError, match=r"run.jsonl is being written by another process"):
            Log(path)
        log.append(STUDENT[1])
    written(path, [STUDENT[2]])
    assert list(read([path])) == STUDENT[:3]


def test_an_episode_is_on_the_disk_before_the_next_begins(tmp_path, monkeypatch):
    path, synced = tmp_path / "run.jsonl", []
    monkeypatch.setattr("os.fsync", lambda file: synced.append(path.stat().st_size))
    with Log(path) as log:
        for count, one in enumerate(STUDENT[:2], 1):
            log.append(one)
            assert len(synced) == count
            assert synced[-1] == path.stat().st_size
