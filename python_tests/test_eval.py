"""`sadkern eval` and `sadkern generate`: interrupted, scored again, kept."""

from __future__ import annotations

import json
import re

import pytest
import torch
from command import sadkern
from small_models import small_model, small_tokenizer
from test_agent import QUESTIONS
from transformers import AutoModelForCausalLM

from sadkern.data import prepare
from sadkern.evaluate import script
from sadkern.evaluate.environments.hotpotqa import HotPotQA
from sadkern.evaluate.episode import read
from sadkern.evaluate.play import Move
from sadkern.evaluate.scripted import perfect
from sadkern.evaluate.tasks import tasks_of
from sadkern.files import BusyError
from sadkern.spans import segment


@pytest.fixture
def games(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return path


class Knowing:
    """Perfect but on "1"; dies after so many turns."""

    def __init__(self, lives=99):
        self.lives, self.policies = lives, {}
        self.known = {question["id"]: HotPotQA(question) for question in QUESTIONS}

    def __call__(self, episodes):
        self.lives -= 1
        if self.lives < 0:
            raise KeyboardInterrupt
        return [self.move(episode) for episode in episodes]

    def move(self, episode):
        if episode.task == "1":
            return Move("hm", "Finish[nobody]", 1, 1)
        key = episode.key
        if not episode.turns:
            self.policies[key] = perfect(self.known[episode.task])
        return self.policies[key]("")


def test_an_interrupted_run_goes_on(tmp_path, games):
    tasks = tasks_of("hotpotqa", games, None, 0)
    whole = script.run(Knowing(), tasks, tmp_path / "whole", samples=2, batch_size=2)
    assert [episode.success for episode in whole].count(True) == 4
    with pytest.raises(KeyboardInterrupt):
        script.run(Knowing(lives=3), tasks, tmp_path / "cut", samples=2, batch_size=2)
    before = list(read([tmp_path / "cut" / script.LOG]))
    assert 0 < len(before) < 6
    rest = script.run(Knowing(), tasks, tmp_path / "cut", samples=2, batch_size=2)
    assert rest[: len(before)] == before
    assert {one.key: one for one in rest} == {one.key: one for one in whole}
    # All is there: nobody is asked.
    assert script.run(Knowing(lives=0), tasks, tmp_path / "cut", samples=2) == rest
    assert script.keep_successful(rest, tmp_path / "cut") == 4
    lines = (tmp_path / "cut" / script.KEPT).read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    assert {line["id"] for line in kept} == {f"hotpotqa:{i}:{n}" for i in (0, 2) for n in (0, 1)}
    assert all("Action: Finish[" in line["text"] for line in kept)


def test_a_second_run_into_the_same_folder_is_refused_and_the_first_goes_on(tmp_path, games):
    tasks = tasks_of("hotpotqa", games, None, 0)
    known = Knowing()

    def agent(episodes):
        with pytest.raises(BusyError, match=r"episodes.jsonl is being written by another process"):
            script.run(Knowing(), tasks, tmp_path)
        return known(episodes)

    assert len(script.run(agent, tasks, tmp_path)) == 3
    assert len(list(read([tmp_path / script.LOG]))) == 3


def by_whole_logits(student, teacher, episode):
    """KL of REASON and of ACT, None where there is none."""
    (example,) = prepare([{"text": episode.text}], small_tokenizer())
    ids = torch.tensor([example["input_ids"]])
    with torch.no_grad():
        q, p = (
            AutoModelForCausalLM.from_pretrained(path)(ids).logits[0].double().log_softmax(-1)
            for path in (student, teacher)
        )
    kl = (p.exp() * (p - q)).sum(-1)
    chosen = [kl[torch.tensor(example["span_ids"]) == kind] for kind in (1, 2)]
    return [one.mean().item() if len(one) else None for one in chosen]


def test_the_commands(tmp_path, games):
    small_model(0).save_pretrained(tmp_path / "model")
    small_tokenizer().save_pretrained(tmp_path / "model")
    tasks = tasks_of("hotpotqa", games, None, 0)
    script.run(Knowing(), tasks, tmp_path / "teacher")
    common = ("--model", tmp_path / "model", "--env", "hotpotqa", "--games", games,
              "--max-turns", 2, "--max-new-tokens", 8)  # fmt: skip
    done = sadkern("eval", *common, "--output", tmp_path / "out", "--teacher", tmp_path / "teacher")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / script.SCORES).read_text())
    scores = found["scores"]["hotpotqa"]
    assert scores["success"]["value"] == 0  # it has learnt nothing
    assert scores["success"]["episodes"] == scores["CoT match"]["episodes"] == 3
    assert found["failures"] == {"2 turns": 3}
    assert (tmp_path / "out" / script.PLOT).stat().st_size > 1000
    assert "CoT match" in done.output
    # Beside itself, and beside another: as whole logits have it.
    small_model(1).save_pretrained(tmp_path / "other")
    small_tokenizer().save_pretrained(tmp_path / "other")
    for teacher in ("model", "other"):
        done = sadkern("eval", *common, "--output", tmp_path / "out", "--teacher-model",
                   tmp_path / teacher)  # fmt: skip
        assert done.exit_code == 0, done.output
        scores = json.loads((tmp_path / "out" / script.SCORES).read_text())["scores"]["hotpotqa"]
        expected = [
            by_whole_logits(tmp_path / "model", tmp_path / teacher, one)
            for one in read([tmp_path / "out" / script.LOG])
        ]
        for number, name in enumerate(("reason KL", "act KL")):
            values = [one[number] for one in expected if one[number] is not None]
            assert scores[name]["episodes"] == len(values) > 0
            assert scores[name]["value"] == pytest.approx(sum(values) / len(values), abs=1e-5)
    assert scores["reason KL"]["value"] > 0.01
    # Another model, or another limit, is another run; a teacher of other tokens is told at once.
    done = sadkern("eval", *common, "--output", tmp_path / "out", "--model", tmp_path / "other")
    assert done.exit_code == 2
    assert "has episodes of another run: model is " in done.output
    larger = small_tokenizer()
    larger.add_tokens(["mug"])
    larger.save_pretrained(tmp_path / "other")
    done = sadkern("eval", *common, "--output", tmp_path / "new", "--teacher-model",
                   tmp_path / "other")  # fmt: skip
    assert done.exit_code == 2
    assert "has other tokens than the agent" in done.output
    assert not (tmp_path / "new" / script.LOG).exists()
    done = sadkern("generate", *common, "--output", tmp_path / "kept", "--samples", 2)
    assert done.exit_code == 0, done.output
    assert "0 of 6 succeeded" in done.output
    assert "nothing to train on: try" in done.output
    assert len(list(read([tmp_path / "kept" / script.LOG]))) == 6


@pytest.mark.parametrize("env", ["alfworld", "hotpotqa", "webshop"])
def test_shipped_prompts_are_episodes_as_the_agent_writes_them(env, tmp_path):
    text = script.prompt_of("react", env)
    instruction, _, example = text.partition("\n\n")
    assert len(instruction.splitlines()) == 2
    thoughts = re.findall(r"^Thought: (.+)$", example, re.MULTILINE)
    actions = re.findall(r"^Action: (.+)$", example, re.MULTILINE)
    assert len(thoughts) == len(actions) >= 4
    spans = segment(example).spans
    assert [example[x.start : x.end].strip() for x in spans] == [
        said for pair in zip(thoughts, actions, strict=True) for said in pair
    ]
    assert text.endswith("\n\n")  # the next transcript begins after a blank line
    own = tmp_path / "own.txt"
    own.write_text("Be brief.\n")
    assert script.prompt_of(str(own), env) == "Be brief.\n"
    assert script.prompt_of(None, env) == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--env", "webshop", "--max-turns", "0"], "greater than or equal to 1"),
        (["--env", "chess"], "env='chess': expected one of alfworld, hotpotqa, webshop"),
        (["--env", "hotpotqa"], "HotPotQA's questions are in a file: expected --games"),
        (["--env", "webshop", "--games", "x"], "WebShop's goals are made here"),
        (["--env", "hotpotqa", "--games", "none.jsonl"], "none.jsonl"),
        (["--env", "webshop", "--teacher", "none.jsonl"], "none.jsonl: expected a log of episodes"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, arguments, said):
    done = sadkern("eval", "--model", tmp_path / "none", "--output", tmp_path / "out", *arguments)
    assert done.exit_code == 2
    assert said in done.output
