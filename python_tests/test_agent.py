"""Agents in environments: what ends an episode, and a model that acts as it was taught."""

from __future__ import annotations

import pytest
import torch
from small_models import V, small_model, small_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from sadkern.evaluate.agent import LanguageAgent, line
from sadkern.evaluate.environments import Outcome
from sadkern.evaluate.environments.hotpotqa import HotPotQA
from sadkern.evaluate.play import Move, Running, play, play_together
from sadkern.evaluate.scripted import perfect
from sadkern.evaluate.transcripts import Transcripts


class Counting:
    """Done after `goal` times "on"; "crash" crashes."""

    name = "counting"

    def __init__(self, goal):
        self.goal, self.task, self.closed = goal, str(goal), False

    def reset(self):
        self.count = 0
        if self.goal < 0:
            raise RuntimeError("no such game")
        return "go"

    def step(self, action):
        if action == "crash":
            raise OSError("the engine is gone")
        if action != "on":
            return Outcome("what?", invalid=True)
        self.count += 1
        done = self.count == self.goal
        return Outcome(f"{self.count}", float(done), done=done, success=done)

    def close(self):
        self.closed = True


def saying(*actions):
    moves = iter(actions)
    return lambda seen: Move("", next(moves))


@pytest.mark.parametrize(
    ("goal", "actions", "failure", "turns"),
    [
        (2, ["on", "on"], "", 2),
        (2, ["on", "off", "on"], "", 3),
        (9, ["on"] * 9, "4 turns", 4),
        (9, ["on", "x", "x", "x"], "3 invalid actions in a row", 4),
        (9, ["on", "crash"], "OSError: the engine is gone", 2),
        (9, ["on"], "StopIteration: ", 1),
        (-1, [], "RuntimeError: no such game", 0),
    ],
)
def test_what_ends_an_episode(goal, actions, failure, turns):
    episode = play(Counting(goal), saying(*actions), max_turns=4, max_invalid=3)
    assert (episode.failure, len(episode.turns)) == (failure, turns)
    assert episode.success == (not failure)
    assert episode.reward == float(not failure)


def test_many_go_on_together():
    envs = [Counting(goal) for goal in (3, 1, 2, -1, 5, 1)]
    asked = []

    def policy(episodes):
        asked.append(len(episodes))
        return [Move("", "on") for _ in episodes]

    found = list(play_together((Running(env, max_turns=4) for env in envs), policy, 2))
    assert [one.task for one in found] == ["1", "3", "2", "-1", "1", "5"]
    assert [one.success for one in found] == [True, True, True, False, True, False]
    assert (max(asked), sum(asked)) == (2, 3 + 1 + 2 + 4 + 1)
    assert all(env.closed for env in envs)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (" Search[x]\nObservation: made up", "Search[x]"),
        ("\n\n a b \nc", "a b"),
        (" go to desk 1", "go to desk 1"),
        ("\n", ""),
        ("", ""),
    ],
)
def test_what_a_model_wrote_is_a_line(text, said):
    assert line(text) == said


QUESTIONS = [
    {
        "id": str(i), "question": f"Who owns the {thing}?", "answer": name,
        "supporting_facts": [[thing, 0]], "context": [[thing, [f"The {thing} is {name}'s."]]],
    }
    for i, (thing, name) in enumerate([("cat", "Ann"), ("dog", "Bob"), ("cow", "Eve")])
]  # fmt: skip


def test_a_model_acts_as_it_was_taught():
    torch.manual_seed(0)
    tokenizer = small_tokenizer()
    taught = [play(env, perfect(env)) for env in map(HotPotQA, QUESTIONS)]
    assert all(one.success for one in taught)
    batch = tokenizer([one.text for one in taught], return_tensors="pt", padding=True)
    model = small_model(0, hidden=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for _ in range(120):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    agent = LanguageAgent(model, tokenizer, max_new_tokens=60)
    running = [Running(HotPotQA(question), max_turns=4) for question in QUESTIONS]
    found = {one.task: one for one in play_together(running, agent, 2)}
    for one in taught:
        own = found[one.task]
        assert own.success, own.text
        assert own.text == one.text
        assert [turn.thought_tokens for turn in own.turns] == [
            len(tokenizer(turn.thought)["input_ids"]) for turn in one.turns
        ]
    # Alone, a transcript is read once, but for what a turn's end lets be tokenised otherwise.
    read = reading(model)
    (alone,) = play_together([Running(HotPotQA(QUESTIONS[0]))], agent, 1)
    length = len(tokenizer(alone.text)["input_ids"])
    assert len(alone.turns) == 2
    assert length - 30 <= read[0] <= length + 10


def reading(model):
    """[tokens that `model` was given, from here on]."""
    read = [0]
    model.register_forward_pre_hook(
        lambda _, __, inputs: read.append(read.pop() + inputs["input_ids"].numel()),
        with_kwargs=True,
    )
    return read


class Unkept(LanguageAgent):
    """Reads each transcript whole."""

    def __call__(self, episodes):
        self._transcripts = Transcripts(self.model, self._padding)
        return super().__call__(episodes)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_was_read_is_not_read_again(kind):
    """Episodes of unlike length that begin and end at unlike times, with a context that overflows:
    the same moves as of an agent that reads all each time, from fewer tokens."""
    tokenizer = small_tokenizer()
    torch.manual_seed(1)
    if kind == "llama":
        model = small_model(1, hidden=64)
    else:
        config = GPT2Config(vocab_size=V, n_embd=64, n_layer=2, n_head=4, n_positions=256)
        model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():  # sure of itself, so that no two tokens are as good
        for weight in model.parameters():
            weight.mul_(3)
    read = reading(model)
    moves, counts = [], []
    for agent in (LanguageAgent, Unkept):
        read[0] = 0
        running = [Running(Counting(99 - n), max_turns=3 + n) for n in range(5)]
        policy = agent(model, tokenizer, max_new_tokens=12)
        found = play_together(running, policy, 3)
        moves.append({one.task: [(t.thought, t.action) for t in one.turns] for one in found})
        counts.append(read[0])
    assert moves[0] == moves[1]
    assert len({str(turns) for turns in moves[0].values()}) > 1
    assert counts[0] < counts[1]


def test_a_transcript_too_long_keeps_its_task_and_its_end():
    tokenizer, model = small_tokenizer(), small_model(0)
    agent = LanguageAgent(model, tokenizer, prefix="x" * 400 + "\n", max_new_tokens=56)
    episode = play(Counting(99), saying(*["on"] * 40), max_turns=40)
    prompt = agent._prompt(episode, "Thought:")
    assert len(prompt) == 256 - 56
    text = tokenizer.decode(prompt)
    assert text[:10] == "x" * 10
    assert "x\ngo\n" in text
    assert text.endswith("Action: on\nObservation: 40\nThought:")
