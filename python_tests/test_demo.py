"""The small world and what the demonstration makes of it."""

from __future__ import annotations

import json
from importlib import resources

import pytest
from rich.console import Console

from sadkern.demo import run, world
from sadkern.evaluate import Comparison
from sadkern.spans import ACT, REASON, segment

SHIPPED = (resources.files("sadkern.demo") / "trajectories.jsonl").read_text("ascii")
RECORDS = [json.loads(line) for line in SHIPPED.splitlines()]


def test_the_shipped_trajectories_are_what_the_script_writes(tmp_path, capsys):
    world.main(["--output", str(tmp_path / "again.jsonl")])
    assert (tmp_path / "again.jsonl").read_text("ascii") == SHIPPED
    assert "360 trajectories" in capsys.readouterr().out
    assert len(RECORDS) >= 300
    assert {record["env"] for record in RECORDS} == {"household", "shop", "facts"}


def test_another_seed_gives_another_world():
    shipped = {record["text"] for record in RECORDS}
    other = world.generate(count_per_env=10, seed=1)
    assert all(record["success"] for record in other)
    assert not shipped & {record["text"] for record in other}


def lines_of(text, label):
    """What stands behind each `label` or `label n`, in order."""
    heads = (line.partition(": ") for line in text.splitlines())
    return [rest for head, _, rest in heads if head.rstrip(" 0123456789") == label]


@pytest.mark.parametrize("env", world.SCENES)
def test_every_trajectory_replays_in_its_world(env):
    for record in (r for r in RECORDS if r["env"] == env):
        text = record["text"]
        actions, observations = lines_of(text, "Action"), lines_of(text, "Observation")
        scene = world.environment(env, int(record["id"].rpartition("-")[2]))
        opening = [scene.reset()] if record["format"] == "paper" else []
        assert scene.task == record["task"]
        seen = [scene.step(action) for action in actions]
        assert opening + [observation for observation, _, _ in seen] == observations
        *before, last = [(reward, done) for _, reward, done in seen]
        assert last == (1.0, True)
        assert set(before) == {(0.0, False)}


def test_spans_are_the_agents_thoughts_and_actions():
    for record in RECORDS:
        text = record["text"]
        thoughts = lines_of(text, "Reasoning" if record["format"] == "paper" else "Thought")
        steps = zip(thoughts, lines_of(text, "Action"), strict=True)
        expected = [x for thought, act in steps for x in ((REASON, thought), (ACT, act))]
        spans = segment(record).spans
        found = [(span.kind, text[span.start : span.end].strip()) for span in spans]
        assert found == expected


@pytest.mark.parametrize(
    ("env", "action"),
    [("household", "go to the moon"), ("shop", "click[nothing]"), ("facts", "Dance[]")],
)
def test_what_cannot_be_done_changes_nothing(env, action):
    scene = world.environment(env, 3)
    scene.reset()
    _, reward, done = scene.step(action)
    assert (reward, done) == (0.0, False)
    record = RECORDS[[r["id"] for r in RECORDS].index(f"{env}-0003")]
    *_, last = [scene.step(act) for act in lines_of(record["text"], "Action")]
    assert last[1:] == (1.0, True)


def test_an_unsolved_task_is_not_a_success():
    scene = world.environment("facts", 0)
    scene.reset()
    _, reward, done = scene.step("Finish[42]")
    assert (reward, done) == (0.0, True)


def test_a_task_that_is_not_there():
    with pytest.raises(ValueError, match=r"shop has \d+ tasks, .* no task 100000"):
        world.environment("shop", 100000)


def test_errors_of_the_script(tmp_path, capsys):
    for options, message in (
        (["--output", str(tmp_path / "no" / "x.jsonl")], "there is no folder"),
        (["--output", str(tmp_path / "x.jsonl"), "--per-env", "0"], "at least 1"),
        (["--output", str(tmp_path / "x.jsonl"), "--per-env", "100000"], "too many"),
    ):
        with pytest.raises(SystemExit):
            world.main(options)
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_table():
    before = Comparison(6.5, 7.25, 0.0, 0.5, 0.125)
    after = Comparison(0.25, 0.125, 0.375, 0.5, 0.75)
    console = Console(width=100)
    with console.capture() as capture:
        console.print(run.table(before, after))
    rows = [[cell.strip() for cell in line.split("│")] for line in capture.get().splitlines()]
    assert [
        "",
        "KL to the teacher, [REASON]  (nats / token)",
        "6.500",
        "0.250",
        "0.000",
        "",
    ] in rows
    assert ["", "KL to the teacher, [ACT]  (nats / token)", "7.250", "0.125", "0.000", ""] in rows
    assert ["", "CoT match with the teacher", "12.5%", "75.0%", "100.0%", ""] in rows
    assert ["", "action accuracy", "0.0%", "37.5%", "50.0%", ""] in rows


def test_the_demonstration_at_its_smallest(tmp_path, monkeypatch):
    """The same seed gives the same numbers, another seed others."""
    monkeypatch.setattr(run, "load_trajectories", lambda path: RECORDS[:28])
    small = {
        "TEACHER": {"width": 96, "layers": 1}, "STUDENT": {"width": 48, "layers": 1},
        "TEACHER_EPOCHS": 2, "STUDENT_EPOCHS": 3,
    }  # fmt: skip
    for setting, value in small.items():
        monkeypatch.setattr(run, setting, value)
    measured = []
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        run.main(tmp_path / name, seed)
        figures = json.loads((tmp_path / name / "demo.json").read_text())
        assert figures["peak_memory_mb"] > 50
        measured.append((figures["before"], figures["after"]))
        for path in ("demo.png", "teacher/model.safetensors", "student/model.safetensors"):
            assert (tmp_path / name / path).stat().st_size > 1000
    assert measured[0] == measured[1]
    assert measured[0] != measured[2]
    for before, after in measured:
        for span in ("reason_kl", "act_kl"):
            assert after[span] < before[span]


@pytest.mark.slow
def test_the_demonstrations_student_comes_close(tmp_path):
    figures = run.main(tmp_path, seed=1)
    before, after = figures["before"], figures["after"]
    for span in ("reason_kl", "act_kl"):
        assert after[span] < 0.1 * before[span]
    assert after["cot_match"] > 0.5
    assert after["action_accuracy"] > 0.5 * after["teacher_action_accuracy"]
