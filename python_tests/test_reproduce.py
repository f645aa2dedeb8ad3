"""The study at small scale: its scripted agents, and its arithmetic."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from bench.reproduce.explorer import GOALS, explorer
from bench.reproduce.report import difference, over_games
from bench.reproduce.study import CELLS, METHODS, SEEDS
from bench.reproduce.wanderer import wanderer
from sadkern.evaluate.environments.alfworld import ALFWorld
from sadkern.evaluate.environments.alfworld_games import game
from sadkern.evaluate.play import play
from sadkern.spans import segment

engine = pytest.mark.skipif(find_spec("alfworld") is None, reason="alfworld is not installed")


def test_cells():
    assert len({cell.name for cell in CELLS}) == len(CELLS) == 3 * (3 * 3 + 6)
    assert {cell.method for cell in CELLS} == set(METHODS)
    assert {cell.seed for cell in CELLS} == set(SEEDS)


def test_each_wording_of_a_goal_is_understood():
    wanted = {
        "look at pen under the desklamp.": {"o": "pen", "lamp": "desklamp"},
        "examine the cd with the desklamp.": {"o": "cd", "lamp": "desklamp"},
        "put two book in desk.": {"o": "book", "r": "desk"},
        "find two book and put them in bed.": {"o": "book", "r": "bed"},
        "put a hot mug in cabinet.": {"how": "hot", "o": "mug", "r": "cabinet"},
        "cool some pan and put it in shelf.": {"how": "cool", "o": "pan", "r": "shelf"},
        "put a egg in fridge.": {"o": "egg", "r": "fridge"},
        "put some vase on safe.": {"o": "vase", "r": "safe"},
    }
    for goal, asked in wanted.items():
        found = next(match for pattern, _ in GOALS if (match := pattern.match(goal)))
        assert found.groupdict() == asked
    for index in range(60):
        assert any(pattern.match(game(1, index)["goal"]) for pattern, _ in GOALS)


def test_means_over_seeds_and_intervals_over_games():
    seeds = [{"a": {"x": 1.0}, "b": {"x": 0.0}}, {"a": {"x": 0.0}, "b": {"x": 0.0}}]
    found = over_games(seeds, "x")
    assert (found.value, found.low, found.high, found.episodes) == (0.25, 0.0, 0.5, 2)
    other = [{"a": {"x": 0.5}, "b": {"x": 0.0}}]
    assert difference(seeds, other, "x")[:3] == (0.0, 0.0, 0.0)


@engine
def test_the_explorer_wins_by_text_alone():
    for index in range(12):
        env = ALFWorld(game(2, index))
        episode = play(env, explorer(index), max_turns=80)
        env.close()
        assert episode.success, (episode.failure, episode.text)
        spans = segment(episode.text).spans
        assert len(spans) == 2 * len(episode.turns)
        assert all(turn.thought for turn in episode.turns)


@engine
def test_the_wanderer_says_what_it_does():
    env = ALFWorld(game(2, 0))
    episode = play(env, wanderer(env, 0), max_turns=30)
    env.close()
    assert not episode.success
    for turn in episode.turns:
        words = turn.action.removeprefix("go to ").split()
        thing = " ".join(words[:2] if turn.action.startswith("go") else words[1:3])
        assert thing in turn.thought or turn.action == "look"
    assert any(turn.observation == "Nothing happens." for turn in episode.turns)
