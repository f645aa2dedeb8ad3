"""What SADTrainer computes, logs, refuses and resumes, against plain torch over whole logits."""

from __future__ import annotations

import copy
import logging
import re

import pytest
import torch
from small_models import RECORDS, V, small_model
from small_trainers import assert_same, plainly, trainer_for

from sadkern.spans import ACT, REASON
from sadkern.train import SADConfig, SADTrainer, SpanCollator, load_trajectories, prepare

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reason_weight": 0.3, "act_weight": 2.0, "temperature": 2.0},
        {"ce_weight": 0.5},
        {"divergence": "reverse_kl"},
        {"projection": False},
    ],
    ids=str,
)
def test_a_step_is_the_plain_computation_over_whole_logits(tmp_path, examples, settings):
    student, teacher = small_model(0), small_model(1, hidden=24, scale=2.0)
    trainer = trainer_for(tmp_path, student, teacher, examples, **settings)
    settings.pop("projection", None)
    loss, gradient, logged = plainly(student, teacher, examples, **settings)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(loss, rel=1e-4)
    assert {key: entry[key] for key in logged} == pytest.approx(logged, rel=1e-5)
    assert ("reason/ce" in entry) == bool(settings.get("ce_weight"))
    assert_same(trainer.gradients.steps[0], gradient)


class Scaled(torch.nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


def test_a_head_that_cannot_be_split_off_is_refused_or_its_logits_are_taken(tmp_path, examples):
    student, teacher = small_model(0), small_model(1)
    head = student.lm_head
    student.lm_head = Scaled(head.in_features, head.out_features, bias=False)
    student.lm_head.weight = head.weight
    with pytest.raises(ValueError, match=r"head of LlamaForCausalLM is no plain.*projection=False"):
        trainer_for(tmp_path, student, teacher, examples)
    _, gradient, _ = plainly(student, teacher, examples)
    trainer = trainer_for(tmp_path, student, teacher, examples, projection=False)
    trainer.train()
    assert_same(trainer.gradients.steps[0], gradient)


def test_gradient_checkpointing_and_bf16_change_rounding_alone(tmp_path, examples):
    student, teacher = small_model(0), small_model(1)
    _, gradient, logged = plainly(student, teacher, examples)
    for settings, tolerance in (({"gradient_checkpointing": True}, 2e-5), ({"bf16": True}, 0.05)):
        trainer = trainer_for(tmp_path, copy.deepcopy(student), teacher, examples, **settings)
        trainer.train()
        assert_same(trainer.gradients.steps[0], gradient, tolerance)
        entry = trainer.state.log_history[0]
        assert entry["act/kl"] == pytest.approx(logged["act/kl"], rel=tolerance)


# 3 x 3: micro-batches of 3, 3 and 2.
@pytest.mark.parametrize(("size", "steps"), [(8, 1), (4, 2), (2, 4), (1, 8), (3, 3)])
def test_accumulated_gradients_are_those_of_one_batch(tmp_path, examples, size, steps):
    student, teacher = small_model(0), small_model(1)
    loss, gradient, _ = plainly(student, teacher, examples)
    trainer = trainer_for(
        tmp_path, student, teacher, examples,
        per_device_train_batch_size=size, gradient_accumulation_steps=steps,
    )  # fmt: skip
    trainer.train()
    assert_same(trainer.gradients.steps[0], gradient)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-4)


def test_a_last_partial_accumulation_has_its_own_counts(tmp_path, examples):
    student, teacher = small_model(0), small_model(1)
    _, gradient, logged = plainly(student, teacher, examples, act_weight=0.0)
    trainer = trainer_for(
        tmp_path, student, teacher, examples, act_weight=0.0, learning_rate=0.0,
        max_steps=-1, num_train_epochs=1,
        per_device_train_batch_size=2, gradient_accumulation_steps=3,
    )  # fmt: skip
    trainer.train()
    first, second = trainer.gradients.steps  # of 6 trajectories and of 2, in whatever order
    counts = [entry["reason/tokens"] for entry in trainer.state.log_history[:2]]
    assert sum(counts) == logged["reason/tokens"]
    mean = {
        name: (first[name] * counts[0] + second[name] * counts[1]) / sum(counts) for name in first
    }
    assert_same(mean, gradient)


def test_what_follows_the_last_span_changes_nothing(tmp_path, examples):
    student, teacher = small_model(0), small_model(1)
    _, gradient, _ = plainly(student, teacher, examples)
    longer = [
        {
            "input_ids": [*example["input_ids"], *range(5, 5 + 7 * i)],
            "span_ids": [*example["span_ids"], *[0] * 7 * i],
        }
        for i, example in enumerate(examples)
    ]
    trainer = trainer_for(tmp_path, student, teacher, longer)
    trainer.train()
    assert_same(trainer.gradients.steps[0], gradient)


def test_a_span_without_weight_gives_no_gradient(tmp_path, examples):
    student, teacher = small_model(0), small_model(1)
    actions = [
        {**example, "span_ids": [k if k == ACT else 0 for k in example["span_ids"]]}
        for example in examples
    ]
    found = []
    for data, settings in ((examples, {"reason_weight": 0.0}), (actions, {})):
        trainer = trainer_for(tmp_path, copy.deepcopy(student), teacher, data, **settings)
        trainer.train()
        found.append((trainer.gradients.steps[0], trainer.state.log_history[0]))
    (weighted, entry), (alone, without) = found
    assert_same(weighted, alone)
    assert entry["reason/kl"] > 0  # measured all the same
    assert "reason/kl" not in without  # no row, no mean: neither 0 nor NaN
    assert without["reason/tokens"] == 0


def test_a_batch_without_a_supervised_row_is_a_zero(tmp_path, examples):
    trainer = trainer_for(tmp_path, small_model(0), small_model(1), examples)
    batch = SpanCollator(0)([{"input_ids": [5, 6, 7], "span_ids": [0, 0, 0]}])
    loss = trainer.training_step(trainer.model, batch, torch.tensor([0.0, 0.0]))
    assert loss == 0
    assert all(not p.grad.any() for p in trainer.model.parameters())


class Favourite:
    """A `TeacherSource` of one's own: certain of one token, and it writes down what it is asked."""

    def __init__(self, token: int, vocab: int):
        self.logits = torch.full((vocab,), -torch.inf).index_fill(0, torch.tensor([token]), 0.0)
        self.asked = []

    def __call__(self, rows, **inputs):
        self.asked.append((rows, inputs["input_ids"]))
        return self.logits.expand(len(rows), -1)


def test_a_teacher_source_of_ones_own(tmp_path, examples):
    # With less of a vocabulary than the student: the student's is compared on the common part.
    student, teacher = small_model(0), Favourite(9, V - 40)
    logq = []
    for example in examples:
        logits = student(torch.tensor([example["input_ids"]])).logits[0, :, : V - 40]
        logq.append(-logits.log_softmax(-1)[torch.tensor(example["span_ids"]) == ACT, 9])
    trainer = trainer_for(tmp_path, student, teacher, examples, max_steps=30)
    trainer.train()
    first, *_, last, _ = trainer.state.log_history
    assert first["act/kl"] == pytest.approx(torch.cat(logq).mean().item(), rel=1e-4)
    assert first["teacher_entropy"] == 0
    assert last["reason/agreement"] == last["act/agreement"] == 1
    rows, input_ids = teacher.asked[0]
    assert len(rows) == first["reason/tokens"] + first["act/tokens"]
    assert input_ids.shape == (8, max(len(example["input_ids"]) for example in examples))


def test_the_student_comes_to_its_teacher(tmp_path, examples):
    student, teacher = small_model(0, hidden=32), small_model(1)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer = trainer_for(tmp_path, student, teacher, examples, max_steps=60)
    trainer.train()
    first, *_, last, _ = trainer.state.log_history
    for key in ("loss", "reason/kl", "act/kl"):
        assert last[key] < 0.3 * first[key], key
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_evaluation_is_over_all_tokens_however_they_are_batched(tmp_path, examples):
    student, teacher = small_model(0), small_model(1)
    settings = {"reason_weight": 0.5, "ce_weight": 0.25}
    loss, _, logged = plainly(student, teacher, examples, **settings)
    for size in (8, 3):
        trainer = trainer_for(
            tmp_path, student, teacher, examples, eval_dataset=examples,
            per_device_eval_batch_size=size, **settings,
        )  # fmt: skip
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
        assert {key: metrics[f"eval_{key}"] for key in logged} == pytest.approx(logged, rel=1e-5)
        assert trainer.state.log_history[-1]["eval_reason/kl"] == metrics["eval_reason/kl"]
        named = trainer.evaluate(metric_key_prefix="test")
        assert named["test_act/kl"] == metrics["eval_act/kl"]


def test_evaluation_takes_nothing_from_what_training_logs(tmp_path, examples):
    _, _, logged = plainly(small_model(0), small_model(1), examples)
    trainer = trainer_for(
        tmp_path, small_model(0), small_model(1), examples, eval_dataset=examples[:3],
        per_device_train_batch_size=2, max_steps=-1, num_train_epochs=3, logging_steps=5,
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_act/kl", greater_is_better=False,
        save_total_limit=1,
    )  # fmt: skip
    trainer.train()
    history = trainer.state.log_history
    # 12 steps: logged at 5 and 10, and the two left over in the summary.
    assert sum(entry.get("act/tokens", 0) for entry in history) == 3 * logged["act/tokens"]
    assert sum("eval_act/kl" in entry for entry in history) == 6
    assert trainer.state.best_metric == min(e["eval_act/kl"] for e in history if "eval_loss" in e)


class Broken(Favourite):
    at = 4

    def __call__(self, rows, **inputs):
        logits = super().__call__(rows, **inputs).clone()
        logits[self.at] = torch.nan
        return logits


@pytest.mark.parametrize("packed", [False, True])
def test_a_divergence_that_is_not_finite_names_its_place(tmp_path, examples, packed):
    teacher = Broken(9, V)
    trainer = trainer_for(tmp_path, small_model(0), teacher, examples, padding_free=packed)
    batch = SpanCollator(0, packed)(examples[:3])
    teacher.at = 4 + sum(map(bool, examples[0]["span_ids"]))
    row = [i for i, kind in enumerate(examples[1]["span_ids"]) if kind][4]
    with pytest.raises(FloatingPointError, match=rf"step 0.*trajectory 1 .*at token {row} is not"):
        trainer.training_step(trainer.model, batch)


def test_where_looking_would_wait_for_a_device_the_log_tells(tmp_path, examples, monkeypatch):
    monkeypatch.setattr(SADTrainer, "_check_finite", lambda *args: None)  # as on a device
    trainer = trainer_for(tmp_path, small_model(0), Broken(9, V), examples)
    with pytest.raises(FloatingPointError, match=r"reason/kl.* not finite in the train batches"):
        trainer.train()


def test_lines_that_are_no_trajectory_are_named_and_the_rest_survives(tmp_path, caplog):
    path = tmp_path / "some.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "Reasoning: caf\xc3\xa9."}\n'  # with a byte order mark
        b'{"text": "cut off\n'
        b"\n"
        b'{"text": 5}\n'
        b'["text"]\n'
        b'{"text": "caf\xe9"}\n'  # not UTF-8
        b'{"text": "half \\ud83d"}\n'
        b'{"text": "Action: go", "prompt": ["a"]}\n' + b"[" * 100_000 + b"\n"
        b'{"text": "Action: go", "prompt": null, "more": [1]}'
    )
    with caplog.at_level(logging.WARNING):
        records = load_trajectories(path)
    assert [record["text"] for record in records] == ["Reasoning: café.", "Action: go"]
    named = [record.getMessage() for record in caplog.records]
    assert all(message.startswith(f"{path}:") for message in named)
    places = [message.removeprefix(f"{path}:").split(" left out: ")[0] for message in named]
    assert places == ["2", "4", "5", "6", "7", "8", "9"]
    assert named[1].endswith(
        'left out: record has "text" 5: expected a string under "text", or a list of messages '
        'under "messages" or "conversations"'
    )


def test_of_many_lines_with_one_fault_the_first_are_named(tmp_path, caplog):
    path = tmp_path / "chat.jsonl"
    path.write_text('{"text": "Action: go"}\n' + '{"messages": []}\n' * 30)
    load_trajectories(path)
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith(f"{path}:2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 20 more left out")


def test_a_file_without_a_trajectory_is_refused(tmp_path):
    path = tmp_path / "none.jsonl"
    path.write_text('{"no": "text"}\n\n7\n')
    with pytest.raises(ValueError, match=r"none.jsonl has no trajectory \(2 lines were left out\)"):
        load_trajectories(path)
    with pytest.raises(FileNotFoundError):
        load_trajectories(tmp_path / "missing.jsonl")


def test_what_is_left_out_and_cut_is_told(tokenizer, examples, caplog):
    with caplog.at_level(logging.WARNING):
        found = prepare([*RECORDS[:2], {"id": "odd", "text": "hello"}, {"text": ""}], tokenizer)
    assert found == examples[:2]
    (message,) = (record.getMessage() for record in caplog.records)
    assert message == "2 trajectories are left out, nothing in them is supervised: odd, 3"

    caplog.clear()
    whole = examples[1]
    keep = whole["span_ids"].index(ACT) + 2
    with caplog.at_level(logging.WARNING):
        (short,) = prepare(RECORDS[1:2], tokenizer, max_length=keep)
    assert short["input_ids"] == whole["input_ids"][:keep]
    lost = [whole["span_ids"].count(k) - short["span_ids"].count(k) for k in (REASON, ACT)]
    assert f"max_length={keep} cut {lost[0]} REASON and {lost[1]} ACT tokens" in caplog.text


def test_what_is_too_long_is_cut_as_asked(tokenizer, examples, caplog):
    whole = examples[1]
    keep = len(whole["input_ids"]) // 2
    (left,) = prepare(RECORDS[1:2], tokenizer, max_length=keep, truncation="left")
    assert left["input_ids"][-3:] == whole["input_ids"][-3:]
    assert len(left["input_ids"]) == keep
    with pytest.raises(ValueError, match="no trajectory has a supervised token"):
        prepare(RECORDS[1:2], tokenizer, max_length=keep, truncation="drop")
    caplog.clear()
    several = prepare(RECORDS[1:2], tokenizer, max_length=keep, truncation="split")
    assert len(several) > 1
    lost = re.search(r"cut (\d+) REASON and (\d+) ACT", caplog.text).groups()
    for kind, cut in zip((REASON, ACT), lost, strict=True):
        held = sum(one["span_ids"].count(kind) for one in several)
        assert held + int(cut) == whole["span_ids"].count(kind)


def test_nothing_supervised_is_refused(tokenizer):
    nothing = [{"text": "hello"}, {"input_ids": [5, 6], "span_ids": [0, 0]}]
    with pytest.raises(ValueError, match="no trajectory has a supervised token"):
        prepare(nothing, tokenizer)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input_ids": [1, 2, 3], "span_ids": [1, 0]}, "3 input_ids and 2 span_ids"),
        ({"input_ids": [1, 2], "span_ids": [3, 0]}, r"span_ids \[0, 3\]: expected 0"),
        ({"input_ids": [1, 2], "span_ids": [1, 2], "id": "x"}, "x has span id 2 at its last token"),
    ],
)
def test_tokenised_trajectories_that_do_not_hold_together(record, message):
    with pytest.raises(ValueError, match=message):
        prepare([record], None)


def test_padding_and_rows():
    batch = SpanCollator(7)(
        [
            {"input_ids": [1, 2], "span_ids": [2, 0]},
            {"input_ids": [3, 4, 5], "span_ids": [0, 1, 0]},
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 7], [3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["span_ids"].tolist() == [[2, 0, 0], [0, 1, 0]]
    assert batch["rows"].tolist() == [0, 4]


@pytest.mark.parametrize(
    ("student", "teacher", "named"), [(V, 200, "teacher"), (200, V, "student")]
)
def test_a_model_of_another_tokenizer_is_named(tmp_path, examples, student, teacher, named):
    largest = max(max(example["input_ids"]) for example in examples)
    message = f"token id {largest} is beyond the {named}'s 200 embeddings"
    with pytest.raises(ValueError, match=message):
        trainer_for(
            tmp_path, small_model(0, vocab=student), small_model(1, vocab=teacher), examples
        )


def test_a_teacher_that_ranks_share_is_not_asked_ahead(tmp_path, examples):
    args = SADConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", teacher_lookahead=2)
    args.fsdp = True
    with pytest.raises(ValueError, match=r"teacher_lookahead=2 with FSDP: expected 0"):
        SADTrainer(small_model(0), small_model(1), args, train_dataset=examples)


def test_a_student_cannot_be_its_own_teacher(tmp_path, examples):
    model = small_model(0)
    with pytest.raises(ValueError, match="the teacher is the student itself"):
        trainer_for(tmp_path, model, model, examples)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_several_devices_in_one_process_are_refused(tmp_path, examples):
    args = SADConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    assert args.n_gpu == 0
    args._n_gpu = 2
    with pytest.raises(ValueError, match="one process sees 2 devices"):
        SADTrainer(small_model(0), small_model(1), args, examples)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"divergence": "kl"}, "divergence='kl'"),
        ({"divergence": "jsd", "beta": 2.0}, "beta=2.0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"act_weight": -1.0}, "span_weights"),
        ({"profile": "prose"}, "profile 'prose'"),
        ({"remove_unused_columns": True}, "would drop the spans"),
    ],
    ids=str,
)
def test_settings_are_checked_before_anything_is_loaded(tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        SADConfig(output_dir=str(tmp_path), use_cpu=True, **setting)


def test_memory_is_pinned_where_there_is_something_to_pin_it_for(tmp_path):
    config = SADConfig(output_dir=str(tmp_path))
    assert config.dataloader_pin_memory is torch.accelerator.is_available()
