"""Difficulty is equation (7) on standardised terms; the sampler goes from easy to hard."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import small_model
from small_trainers import trainer_for

from sadkern.curriculum import PACINGS, CurriculumSampler, difficulty
from sadkern.teacher import CachedTeacher, HardLabels, OnlineTeacher, mean_entropies
from sadkern.teacher.source import trajectories

N = 300


def test_difficulty_is_the_papers():
    reason, act, entropy = [10, 20, 60, 30], [5, 1, 2, 8], [0.1, 0.9, 0.4, 0.2]
    found = difficulty(reason, act, entropy, weights=(0.5, 2.0, 3.0))

    def standard(values):
        return [(x - statistics.mean(values)) / statistics.pstdev(values) for x in values]

    expected = [
        0.5 * r + 2 * a + 3 * h
        for r, a, h in zip(*map(standard, (reason, act, entropy)), strict=True)
    ]
    assert found == pytest.approx(expected)
    # Neither a unit nor an offset of a term matters.
    assert difficulty([x * 7 + 3 for x in reason], act, entropy, weights=(0.5, 2, 3)) == (
        pytest.approx(expected)
    )
    assert difficulty([3, 3], [0.1] * 2, None) == [0.0, 0.0]
    assert difficulty([], [], []) == []


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        (([1, 2], [1], None), "act has 1 numbers, 1 of them finite: expected .* each of 2"),
        (([1, 2], [1, 2], [0.5, float("nan")]), "entropy has 2 numbers, 1 of them finite"),
    ],
)
def test_terms_that_do_not_fit_are_told(terms, said):
    with pytest.raises(ValueError, match=said):
        difficulty(*terms)


@pytest.mark.parametrize("pacing", PACINGS)
def test_pacings_rise_from_the_start_to_all(pacing):
    share = PACINGS[pacing]
    values = [share(i / 100, 0.25) for i in range(101)]
    assert values[-1] == 1
    assert values[0] == (1 if pacing == "none" else 0.25)
    assert all(a <= b for a, b in itertools.pairwise(values))
    middle = {"none": 1, "linear": 0.625, "root": (0.0625 + 0.9375 / 2) ** 0.5, "step": 0.625}
    assert values[50] == pytest.approx(middle[pacing])


def epochs(sampler, count):
    for epoch in range(count):
        sampler.set_epoch(epoch)
        yield list(sampler)


@pytest.mark.parametrize("pacing", ["linear", "root"])
def test_an_epoch_gives_each_once_easy_ones_first(pacing):
    difficulties = [(i * 37) % N for i in range(N)]  # a permutation, so difficulty is the rank
    first, second = epochs(CurriculumSampler(difficulties, pacing), 2)
    assert sorted(first) == sorted(second) == list(range(N))
    assert all(
        difficulties[i] < max(PACINGS[pacing](k / N, 1 / 3) * N + 1, k + 1)
        for k, i in enumerate(first)
    )
    means = [statistics.mean(difficulties[i] for i in part) for part in (first[:100], first[-100:])]
    assert means[0] < N / 3
    assert means[1] > N / 2
    # Afterwards it is a shuffle like any other.
    assert abs(statistics.mean(difficulties[i] for i in second[: N // 2]) - N / 2) < 30


@given(
    st.lists(st.floats(-3, 3), max_size=40), st.sampled_from(list(PACINGS)),
    st.floats(0.1, 4), st.floats(0.01, 1), st.integers(0, 3),
)  # fmt: skip
def test_what_is_drawn_is_let_in_and_rounds_are_whole(difficulties, pacing, length, start, seed):
    sampler = CurriculumSampler(difficulties, pacing, epochs=length, start=start, seed=seed)
    for epoch, drawn in enumerate(epochs(sampler, 6)):
        assert len(drawn) == len(sampler) == len(difficulties)
        seen: set[int] = set()
        for k, i in enumerate(drawn):
            inside = sampler.easiest[: sampler.let_in(k)]
            assert i in inside
            if i in seen:  # only when nothing is left
                assert seen >= set(inside)
                seen = set()
            seen.add(i)
        if epoch >= length:
            assert sorted(drawn) == list(range(len(difficulties)))
        assert drawn == list(sampler)  # and so of each process, and when resumed
    sampler.seed += 1
    assert len(difficulties) < 20 or drawn != list(sampler)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pacing": "fast"}, "curriculum='fast': expected one of none, linear"),
        ({"epochs": 0.0}, "curriculum_epochs=0.0: expected a positive"),
        ({"start": 1.5}, "curriculum_start=1.5: expected above 0 and at most 1"),
    ],
)
def test_settings_out_of_range_are_told(settings, said):
    with pytest.raises(ValueError, match=said):
        CurriculumSampler([1.0], **settings)


class Listening:
    """A teacher of hard labels that keeps what it was asked, a batch each."""

    def __init__(self):
        self.asked = []

    def __call__(self, rows, **inputs):
        asked = [tuple(ids.tolist()) for ids, _ in trajectories(rows, **inputs)]
        self.asked.append(asked)
        return HardLabels()(rows, **inputs)


@pytest.mark.usefixtures("one_thread")
def test_the_trainer_draws_what_the_sampler_says_and_logs_how_hard_it_is(tmp_path, examples):
    teacher = Listening()
    trainer = trainer_for(
        tmp_path, small_model(0), teacher, examples, curriculum="linear", curriculum_epochs=1.5,
        per_device_train_batch_size=2, max_steps=8, curriculum_weights=[1.0, 2.0, 0.0],
    )  # fmt: skip
    assert teacher.asked == []  # nobody needs an entropy
    trainer.train()
    counts = [[example["span_ids"].count(kind) for example in examples] for kind in (1, 2)]
    hard = difficulty(*counts, weights=(1, 2, 0))
    sampler = CurriculumSampler(hard, "linear", epochs=1.5, seed=42)
    drawn = [i for epoch in epochs(sampler, 2) for i in epoch]
    assert len(drawn) == 16
    tokens = [tuple(example["input_ids"]) for example in examples]
    assert [ids for batch in teacher.asked for ids in sorted(batch)] == [
        ids for k in range(0, 16, 2) for ids in sorted(tokens[i] for i in drawn[k : k + 2])
    ]
    logged = [log["curriculum/difficulty"] for log in trainer.state.log_history if "loss" in log]
    assert logged == pytest.approx(
        [(hard[drawn[k]] + hard[drawn[k + 1]]) / 2 for k in range(0, 16, 2)], rel=1e-5, abs=1e-6
    )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("mode", ["topk", "hidden", "sampled"])
def test_a_teachers_entropy_is_the_same_from_everywhere(tmp_path, tokenizer, examples, mode):
    """Over the whole vocabulary, whatever of it is kept."""
    model = small_model(1, scale=3.0)
    online = OnlineTeacher(model)
    expected = []
    for example in examples:
        logprobs = model.double()(torch.tensor([example["input_ids"]])).logits[0].log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        expected.append(entropy[torch.tensor(example["span_ids"]) != 0].mean().item())
    model.float()
    assert mean_entropies(online, examples, batch_size=3) == pytest.approx(expected, rel=1e-5)
    through = CachedTeacher(tmp_path / "cache", online, tokenizer=tokenizer, mode=mode, k=20)
    assert mean_entropies(through, examples, batch_size=3) == pytest.approx(expected, rel=1e-5)
    through.close()
    kept = CachedTeacher(tmp_path / "cache")  # and no teacher is needed any more
    assert mean_entropies(kept, examples) == pytest.approx(expected, rel=1e-5)
    assert mean_entropies(HardLabels(), examples) == [0.0] * len(examples)
    trainer = trainer_for(tmp_path, small_model(0), kept, examples, curriculum="root")
    counts = [[example["span_ids"].count(kind) for example in examples] for kind in (1, 2)]
    assert [example["difficulty"] for example in trainer.train_dataset] == pytest.approx(
        difficulty(*counts, expected), rel=1e-4
    )
