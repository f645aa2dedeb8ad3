"""HotPotQA over given paragraphs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from sadkern.evaluate.environments.hotpotqa import HotPotQA, f1_score, questions

REAL = Path(__file__).parents[2] / "shared" / "data" / "hotpotqa_context.dev.jsonl.gz"
QUESTION = {
    "id": "q", "question": "Who painted the cat?", "answer": "Ann Lee",
    "context": [
        [
            "The Cat (painting)",
            ["The Cat is a painting.", " It was made by Ann Lee. ", "Lee sold it."],
        ],
        ["Ann Lee", ["Ann Lee was a painter."]],
        ["Dog", ["A dog."]],
    ],
}  # fmt: skip


def test_an_episode():
    env = HotPotQA(QUESTION)
    assert env.reset() == "Question: Who painted the cat?"
    assert env.step("Lookup[Lee]").observation.startswith("No page is open")
    near = env.step("Search[cat paintings]").observation
    assert near.startswith("Could not find [cat paintings]. Similar: ['The Cat (painting)'")
    page = env.step("search[the cat (painting)]")
    assert page.observation == "The Cat is a painting. It was made by Ann Lee. Lee sold it."
    assert not page.done
    found = [env.step("Lookup[lee]").observation for _ in range(3)]
    assert found == [
        "(Result 1 / 2) It was made by Ann Lee.", "(Result 2 / 2) Lee sold it.", "No more results.",
    ]  # fmt: skip
    wrong = env.step("paint[cat]")
    assert (wrong.invalid, wrong.done) == (True, False)
    end = env.step(" Finish[The Ann Lee.] ")
    assert (end.done, end.success, end.reward, end.facts["f1"]) == (True, True, 1.0, 1.0)
    env.reset()
    end = env.step("finish[Bob Lee]")
    assert (end.done, end.success, end.reward) == (True, False, 0.0)
    assert end.facts == {"answer": "Bob Lee", "f1": 0.5}
    assert env.step("Lookup[Lee]").observation.startswith("No page is open")  # since the reset


@pytest.mark.parametrize(
    ("answer", "gold", "f1"),
    [
        ("yes", "Yes.", 1.0),
        ("yes it is", "yes", 0.0),
        ("no", "no one", 0.0),
        ("a b b c", "b b d", 4 / 6),
        ("", "x", 0.0),
    ],
)
def test_f1_is_that_of_hotpotqa(answer, gold, f1):
    assert f1_score(answer, gold) == pytest.approx(f1)


def test_what_is_no_question_is_named(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps(QUESTION) + '\n{"id": "x"}\n')
    with pytest.raises(ValueError, match=r"some.jsonl, line 2: no HotPotQA question .*'question'"):
        list(questions(path))
    path.write_text("{")
    with pytest.raises(ValueError, match=r"some.jsonl, line 1"):
        list(questions(path))


def test_a_question_as_the_hub_has_it():
    titles, sentences = zip(*QUESTION["context"], strict=True)
    context = {"title": list(titles), "sentences": list(sentences)}
    assert HotPotQA({**QUESTION, "context": context}).paragraphs == HotPotQA(QUESTION).paragraphs


def test_questions_are_read_as_trajectories_are(tmp_path):
    """Compressed whatever the name says, with a byte order mark, an empty line left out."""
    path = tmp_path / "some.jsonl"
    path.write_bytes(gzip.compress(f"\ufeff{json.dumps(QUESTION)}\n\n".encode()))
    (read,) = questions(path)
    assert read.task == QUESTION["id"]


@pytest.mark.skipif(not REAL.exists(), reason="the shared data is not here")
def test_a_perfect_agent_on_real_questions():
    """It reads the paragraphs that hold the facts, and knows the answer."""
    with gzip.open(REAL, "rt") as lines:
        records = [json.loads(line) for line in lines]
    solved = 0
    for env, record in zip(questions(REAL), records, strict=True):
        env.reset()
        for title, place in record["supporting_facts"]:
            seen = env.step(f"Search[{title}]").observation
            said = dict(record["context"])[title]
            if place < len(said):
                assert said[place].strip() in seen
        solved += env.step(f"Finish[{record['answer']}]").success
    assert solved == len(records) == 202
