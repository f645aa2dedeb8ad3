"""The study at small scale: its scripted agents, and its arithmetic."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from bench.reproduce import __main__ as command
from bench.reproduce import material, report, students, study
from bench.reproduce.explorer import GOALS, explorer
from bench.reproduce.report import difference, over_games
from bench.reproduce.study import CELLS, METHODS, SEEDS, Cell, Folder, Size
from bench.reproduce.wanderer import wanderer
from sadkern.evaluate.environments.alfworld import ALFWorld
from sadkern.evaluate.environments.alfworld_games import game
from sadkern.evaluate.play import play
from sadkern.evaluate.script import LOG
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


def test_a_cell_needs_no_other_and_one_base():
    names = {name for stage in command.jobs() for name in stage}
    assert names - command.unneeded_for("token-large-1") == {
        "episodes-0", "episodes-1", "tokenizer", "teacher", "base-large", "signal",
        "teacher-plays", "token-large-1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--again"], "Name it by --cell"),
        (["--cell", "sad-small-0", "--write"], "expected no --cell beside it"),
        (["--cell", "sad-huge-0"], "expected one of sad-small-0"),
        (["--games", "{games}"], "none of its games is of the split valid_unseen"),
    ],
)
def test_what_it_cannot_do_is_refused(arguments, said, tmp_path, monkeypatch, capsys):
    games = tmp_path / "games.jsonl"
    games.write_text(json.dumps(game(1, 0)) + "\n")
    monkeypatch.setattr(
        "sys.argv",
        [
            "reproduce",
            "--output",
            str(tmp_path / "run"),
            *(x.format(games=games) for x in arguments),
        ],
    )
    with pytest.raises(SystemExit):
        command.main()
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "test_games.jsonl").exists()


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
    episode = play(env, wanderer(env, 0), max_turns=90)
    env.close()
    assert not episode.success
    for turn in episode.turns:
        words = turn.action.removeprefix("go to ").split()
        thing = " ".join(words[:2] if turn.action.startswith("go") else words[1:3])
        assert thing in turn.thought or turn.action == "look"
    assert any(turn.observation == "Nothing happens." for turn in episode.turns)


@engine
def test_the_whole_study_with_little_of_everything(tmp_path, monkeypatch, capsys):
    """Every stage on few games and tiny models, and what is written of it."""
    little = {
        "GAMES": 6, "WANDERED": 4, "HELD_OUT": 2, "BASE_STEPS": 3, "TEACHER_STEPS": 3,
        "STUDENT_STEPS": 2, "MAX_TURNS": 2, "MAX_NEW_TOKENS": 6, "TEACHER": Size(32, 1),
        "SIZES": dict.fromkeys(study.SIZES, Size(32, 1)),
    }  # fmt: skip
    for name, value in little.items():
        for module in (study, material, students, report, command):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    methods = ["sad", "token", "hard", "random", "curriculum"]
    methods += ["peer"] if find_spec("trl") and find_spec("datasets") else []
    cells = [Cell(method, "middle", 0) for method in methods]
    for module in (students, report, command):
        monkeypatch.setattr(module, "CELLS", cells)
    folder = Folder(tmp_path / "run")
    material.write_test_games(folder, [game(1, index) for index in range(2)])
    for stage in command.jobs():
        for name, job in stage.items():
            job(folder)
            command.write_json(folder.done(name), {"seconds": 36})
    report.tell(folder, write=False)
    found = json.loads((folder.root / "reproduce.json").read_text())
    assert set(found["rows"]) == {f"{method}-middle" for method in methods}
    for row in found["rows"].values():
        assert row["success"]["value"] == 0.0
        assert row["success"]["episodes"] == 2
        assert row["reason KL"] > 0
        assert 0 <= row["steps"]["value"] <= 4
    assert found["teacher"]["CoT match"]["value"] == 100.0
    assert found["core hours"] == pytest.approx(0.01 * len(found["seconds"]))
    assert "sad - token, middle" in found["differences"]
    text = (folder.root / "reproduce.md").read_text()
    assert "| 43.7 / 11.2 / 62.3 / 8.2 |" not in text  # of a size that is not here
    assert "| 56.3 / 9.8 / 71.5 / 7.1 |" in text
    assert (folder.root / "reproduce.png").stat().st_size > 10_000
    report.tell_cell(folder, "sad-middle-0")
    told = capsys.readouterr().out
    assert "sad-middle-0" in told
    assert f"{found['cells']['sad-middle-0']['reason KL']:.6g}" in told
    # Again: the same words.
    first = (folder.cell("sad-middle-0") / LOG).read_text()
    before = command.set_aside(folder, "sad-middle-0")
    students.teach(folder, "sad-middle-0")
    assert (folder.cell("sad-middle-0") / LOG).read_text() == first
    assert command.again(before, folder.cell("sad-middle-0")) == 0
    assert "2 episodes word for word" in capsys.readouterr().out
