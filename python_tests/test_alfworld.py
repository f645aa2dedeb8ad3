"""ALFWorld's engine: recorded episodes, and agents that see all or nothing."""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path

import pytest

from sadkern.evaluate.environments.alfworld import NOTHING, ALFWorld, games
from sadkern.evaluate.play import play
from sadkern.evaluate.scripted import drawn, perfect

DATA = Path(__file__).parents[2] / "shared" / "data"
GAMES, RECORDED = DATA / "alfworld_games.dev.jsonl.gz", DATA / "alfworld.dev.jsonl"
pytest.importorskip("alfworld", reason="alfworld is not installed")
pytestmark = pytest.mark.skipif(not GAMES.exists(), reason="the shared data is not here")


@pytest.fixture(scope="module")
def known():
    return {game["id"]: game for game in games(GAMES)}


def recorded(text):
    """Commands and what came back, of a transcript of ADaPT: ">" begins a command, the first one's
    was in the prompt, and a bare ">" ends one executor, whose successor goes on without."""
    found, begins = [], True
    for line in text.split("\n"):
        said = line.strip()
        if said.startswith(">") or (begins and said):
            command = said.removeprefix(">").strip()
            begins = not command
            if command:
                found.append((command, []))
        elif said and found:
            found[-1][1].append(said)
    return [(command, "\n".join(seen)) for command, seen in found]


def episodes(known):
    for line in RECORDED.read_text().splitlines():
        record = json.loads(line)
        if record["format"] == "react-alfworld" and record["task"] in known and record["text"]:
            yield record


PARTS = [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 16))]


@pytest.mark.parametrize("part", PARTS)
def test_recorded_episodes_replay_with_the_outcome_recorded(known, part):
    replayed = seen = 0
    chosen = list(episodes(known))[part :: len(PARTS)]
    for record in chosen:
        env = ALFWorld(known[record["task"]])
        opening = env.reset()
        assert opening == record["prompt"], record["id"]
        won = False
        for command, observation in recorded(record["text"]):
            if command.startswith("think:"):
                continue
            outcome = env.step(command)
            won = won or outcome.success
            # Where it arrives has a number now.
            now = outcome.observation
            if now.startswith("You arrive at loc"):
                now = "You arrive at the location." + now.partition(".")[2]
            assert now == observation, (record["id"], command)
            seen += 1
        env.close()
        assert won == record["success"], record["id"]
        replayed += 1
    assert replayed == len(chosen) >= 5
    assert seen > 5 * replayed


def by_kind(known):
    """Games of all six kinds in turns."""
    kinds: dict[str, list] = {}
    for game in known.values():
        kinds.setdefault(game["task_type"], []).append(game)
    assert len(kinds) == 6
    return [game for turn in zip_longest(*kinds.values()) for game in turn if game is not None]


@pytest.mark.parametrize("part", [
    0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 55))
])  # fmt: skip
def test_an_agent_that_sees_the_state_always_succeeds(known, part):
    for game in by_kind(known)[6 * part : 6 * part + 6]:
        env = ALFWorld(game)
        episode = play(env, perfect(env))
        env.close()
        assert episode.success, (game["id"], episode.failure, episode.text)
        assert episode.reward == 1.0
        assert all(turn.thought and turn.action for turn in episode.turns)


def test_one_that_draws_seldom_does(known):
    won = 0
    for game in by_kind(known)[:12]:
        env = ALFWorld(game)
        won += play(env, drawn(env, 0), max_turns=25).success
        env.close()
    assert won <= 1


def test_words_of_the_engine_and_of_published_trajectories(known):
    game = next(g for g in known.values() if g["task_type"] == "pick_and_place_simple")
    for words, verb in ((True, "put "), (False, "move ")):
        env = ALFWorld(game, recorded_words=words)
        episode = play(env, perfect(env))
        assert episode.turns[-1].action.startswith(verb)
        assert episode.turns[-1].observation.startswith(f"You {verb}")
        outcome = env.step("fly to the moon")
        assert (outcome.invalid, outcome.observation) == (True, NOTHING)
        env.close()


def test_what_is_no_game_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no ALFWorld game \(\['id'\]\): expected id, goal"):
        ALFWorld({"id": "x"})
    path = tmp_path / "games.jsonl"
    path.write_text('{"id": "a", "goal": "b", "pddl_problem": ""}\n[]\n')
    with pytest.raises(ValueError, match=r"games.jsonl, line 2: no ALFWorld game"):
        list(games(path))
