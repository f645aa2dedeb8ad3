"""Metrics by hand, and the comparison of two models by whole logits in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import small_model, small_tokenizer

from sadkern.evaluate import compare, cot_match
from sadkern.evaluate.compare import continue_greedily, kl_of_episode, spans_of
from sadkern.evaluate.episode import Episode, Turn
from sadkern.spans import ACT, REASON


def test_cot_match_is_the_papers():
    # Its example: six of nine tokens.
    assert f"{cot_match('abcdefxyz', 'abcdefghi'):.1%}" == "66.7%"
    assert cot_match("", "ab") == 0
    assert cot_match("ab", "") == 1
    # Of multisets: a token that the teacher wrote twice must be written twice.
    assert cot_match("ab", "aab") == pytest.approx(2 / 3)
    assert cot_match("aaaa", "aab") == pytest.approx(2 / 3)


def test_spans_are_ranges_of_rows():
    example = {"span_ids": [0, 1, 1, 2, 0, 2, 2, 0]}
    assert list(spans_of(example, REASON)) == [(1, 3)]
    assert list(spans_of(example, ACT)) == [(3, 4), (5, 7)]


def test_divergences_and_actions_are_those_of_whole_logits(examples):
    # A student near enough to its teacher to get some actions right and some wrong.
    teacher = small_model(1, hidden=32)
    train_a_little(teacher, examples)
    student = copy.deepcopy(teacher)
    torch.manual_seed(0)
    for parameter in student.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    got = compare(student, teacher, examples)

    kl = {REASON: [], ACT: []}
    right = {"student": [], "teacher": []}
    sides = {"student": copy.deepcopy(student).double(), "teacher": copy.deepcopy(teacher).double()}
    for example in examples:
        ids = torch.tensor([example["input_ids"]])
        logits = {name: model(ids).logits[0].detach() for name, model in sides.items()}
        logq, logp = (logits[name].log_softmax(-1) for name in ("student", "teacher"))
        rows = (logp.exp() * (logp - logq)).sum(-1)
        for kind in kl:
            kl[kind] += rows[torch.tensor(example["span_ids"]) == kind].tolist()
        for name in right:
            for begin, end in spans_of(example, ACT):
                best = logits[name][begin:end].argmax(-1).tolist()
                right[name].append(best == example["input_ids"][begin + 1 : end + 1])
    assert got.reason_kl == pytest.approx(sum(kl[REASON]) / len(kl[REASON]), rel=1e-5)
    assert got.act_kl == pytest.approx(sum(kl[ACT]) / len(kl[ACT]), rel=1e-5)
    assert 0 < sum(right["student"]) < sum(right["teacher"])
    assert got.action_accuracy == sum(right["student"]) / len(right["student"])
    assert got.teacher_action_accuracy == sum(right["teacher"]) / len(right["teacher"])
    assert 0 < got.cot_match < 1


def train_a_little(model, examples):
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(80):
        for example in examples:
            ids = torch.tensor([example["input_ids"]])
            model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_model_is_its_own_equal(examples):
    model = small_model(0)
    got = compare(model, copy.deepcopy(model), examples)
    assert got.reason_kl == got.act_kl == 0
    assert got.cot_match == 1
    assert got.action_accuracy == got.teacher_action_accuracy


def test_batched_continuations_are_those_of_one_at_a_time(examples):
    model = small_model(0).double()
    contexts = [example["input_ids"][: 5 + 3 * i] for i, example in enumerate(examples)]

    def alone(context):
        ids, written = torch.tensor([context]), []
        for _ in range(12):
            token = model(ids).logits[0, -1].argmax()
            if token.item() in stops:
                break
            written.append(token.item())
            ids = torch.cat([ids, token.view(1, 1)], 1)
        return written

    stops = [0]
    whole = [alone(context) for context in contexts]
    stops = sorted({written[6] for written in whole})  # so that most stop, at different places
    expected = [alone(context) for context in contexts]
    assert len({len(written) for written in expected}) > 2
    assert list(continue_greedily(model, contexts, stops, 3, 12)) == expected


def test_of_an_episode_in_which_nothing_was_said_or_done_there_is_no_divergence():
    silent = Episode("alfworld", "a task", (Turn("", "", "Nothing happens."),), False, 0.0)
    model = small_model(0)
    assert kl_of_episode(model, model, small_tokenizer(), silent) == {}
