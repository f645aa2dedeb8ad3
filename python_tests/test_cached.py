"""A run with a cache is the run with the teacher, and a cache of something else is refused."""

from __future__ import annotations

import copy
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from small_models import V, small_model
from small_trainers import repeatable, trainer_for

from sadkern import Projection, TopK, span_kl, topk_logprobs
from sadkern.data import SpanCollator
from sadkern.store import DamagedError, Identity, IdentityError, Store
from sadkern.store.care import verify
from sadkern.store.codec import STEPS
from sadkern.store.shard import Shard
from sadkern.teacher import CachedTeacher, MissingError, OnlineTeacher, build, store_for
from sadkern.teacher.ahead import Ahead
from sadkern.teacher.load import load_teacher, quantization_loss, said
from sadkern.teacher.online import fingerprint

# Of one log-probability, and of the shift that makes the row's mass 1 again: both at most this, as
# none of these is below -16.
ERROR = 2 * (1 + 16**2) ** 0.5 / (2 * STEPS)


@pytest.fixture
def teacher():
    return OnlineTeacher(small_model(1, hidden=24, scale=3.0))


def cached(path, examples, teacher, tokenizer, **settings):
    store = store_for(path, teacher, tokenizer, **settings)
    build(store, examples, teacher, batch_size=3, progress=False)
    return CachedTeacher(path)


def batch_of(examples):
    batch = SpanCollator(0)(examples)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return batch["rows"], inputs, batch["span_ids"].flatten()[batch["rows"]]


@pytest.mark.parametrize("mode", ["topk", "hidden"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_training_with_a_cache_of_all_tokens_is_training_with_the_teacher(
    tmp_path, examples, teacher, tokenizer, mode, divergence
):
    settings = {"divergence": divergence, "num_train_epochs": 1, "max_steps": 3,
                "per_device_train_batch_size": 4}  # fmt: skip
    of_cache = cached(tmp_path / "c", examples, teacher, tokenizer, mode=mode, k=V)
    runs = []
    for source in (teacher, of_cache):
        trainer = trainer_for(
            tmp_path, small_model(0), source, examples, tokenizer, **settings, learning_rate=1e-3
        )
        trainer.train()
        runs.append((trainer.state.log_history, trainer.gradients.steps))
    (logged, gradients), (of_cached, theirs) = runs
    for step, other in zip(logged[:3], of_cached[:3], strict=True):
        for name in ("loss", "reason/kl", "act/kl", "teacher_entropy"):
            assert other[name] == pytest.approx(step[name], rel=2e-3, abs=2e-3), name
        assert other["reason/tokens"] == step["reason/tokens"]
    for step, other in zip(gradients, theirs, strict=True):
        for name, gradient in step.items():
            error = (other[name] - gradient).norm() / gradient.norm()
            assert error < 2e-3, name  # float16's eps is 1e-3


def test_each_row_of_a_cache_of_all_tokens_is_the_teachers(tmp_path, examples, teacher, tokenizer):
    rows, inputs, kinds = batch_of(examples)
    student = torch.randn(len(rows), V)
    signal = cached(tmp_path, examples, teacher, tokenizer, k=V)(rows, **inputs)
    whole = topk_logprobs(teacher(rows, **inputs), V)
    assert torch.equal(signal.ids, whole.ids)
    assert (signal.logprobs - whole.logprobs).abs().max() < ERROR
    torch.testing.assert_close(signal.entropy, whole.entropy)
    ours, theirs = (span_kl(student, t, kinds).per_token for t in (signal, whole))
    # Sum_k p_k |error of log p_k| (1 + |log p_k / q_k|), and no log ratio here is above 25.
    assert (ours - theirs).abs().max() < ERROR * 26


@pytest.mark.parametrize("closeness", [0.05, 0.5, 3.0])
def test_the_bucket_loss_of_64_tokens_is_at_most_the_full_one_on_every_row(
    tmp_path, examples, teacher, tokenizer, closeness
):
    rows, inputs, kinds = batch_of(examples)
    signal = cached(tmp_path, examples, teacher, tokenizer, k=64)(rows, **inputs)
    full = teacher(rows, **inputs)
    logits = full.hidden @ full.weight.T
    student = logits + closeness * torch.randn_like(logits)
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        of_bucket, of_all = (
            span_kl(student, t, kinds, divergence=divergence).per_token for t in (signal, full)
        )
        assert (of_bucket <= of_all + 1e-5).all(), divergence
        assert (of_bucket >= -1e-6).all()
        assert of_bucket.sum() > 0.5 * of_all.sum()  # and it is most of it


def test_a_cache_does_not_care_how_batches_are_made(tmp_path, examples, teacher, tokenizer):
    source = cached(tmp_path, examples, teacher, tokenizer)
    whole = {}
    for index, example in enumerate(examples):
        rows, inputs, _ = batch_of([example])
        whole[index] = source(rows, **inputs)
    for order in ([0, 1, 2, 3, 4, 5, 6, 7], [5, 2], [7, 0, 3, 3]):
        rows, inputs, _ = batch_of([examples[i] for i in order])
        signal = source(rows, **inputs)
        for name in ("ids", "logprobs", "tail_mass", "entropy"):
            expected = torch.cat([getattr(whole[i], name) for i in order])
            assert torch.equal(getattr(signal, name), expected), name
    # Of fewer spans (weights of 0, ablations) the rows are found among those that are kept.
    rows, inputs, kinds = batch_of(examples)
    some = source(rows[kinds == 2], **inputs)
    assert torch.equal(some.ids, source(rows, **inputs).ids[kinds == 2])


def test_of_each_row_the_actual_tokens_logprob_is_kept(tmp_path, examples, teacher, tokenizer):
    rows, inputs, _ = batch_of(examples)
    full = teacher(rows, **inputs)
    labels = inputs["input_ids"].flatten()[rows + 1]
    expected = (full.hidden @ full.weight.T).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    from sadkern.store import content_key

    for mode in ("topk", "hidden", "sampled"):
        store = cached(tmp_path / mode, examples, teacher, tokenizer, mode=mode, k=4).store
        found = [store.read(content_key(one["input_ids"]))["label_logprob"] for one in examples]
        found = torch.cat([torch.from_numpy(one) for one in found])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_is_drawn_has_the_teachers_gradient_on_average(tmp_path, examples, tokenizer):
    teacher = OnlineTeacher(small_model(1, scale=1.5))
    rows, inputs, kinds = batch_of(examples)
    signal = cached(tmp_path, examples, teacher, tokenizer, mode="sampled", k=400)(rows, **inputs)
    assert torch.equal(signal.tail_mass, torch.zeros(len(rows)))
    gradients = []
    for one in (signal, teacher(rows, **inputs)):
        student = torch.zeros(len(rows), V, requires_grad=True)
        span_kl(student, one, torch.ones_like(kinds), tail="none", reduction="sum").loss.backward()
        gradients.append(student.grad)
    drawn, full = gradients
    # The mean over 300 rows of 400 draws; its error has a deviation of sqrt(p / draws).
    deviation = ((1 / V - full).clamp(min=0).sum(0)).sqrt() / 400**0.5
    assert ((drawn.sum(0) - full.sum(0)).abs() < 5 * deviation + 1e-3).all()


@pytest.mark.parametrize("change", ["tokenizer", "template", "temperature", "revision", "k"])
def test_another_signal_is_refused_with_what_differs(
    tmp_path, examples, teacher, tokenizer, change
):
    cached(tmp_path / "c", examples, teacher, tokenizer)
    run = {"temperature": 1.0, "tokenizer": tokenizer}
    if change in ("revision", "k"):
        other = copy.deepcopy(teacher.model)
        k = 64
        if change == "revision":
            other.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-3
        else:
            k = 32
        with pytest.raises(IdentityError, match=f"{change}.* there and .* here"):
            CachedTeacher(tmp_path / "c", OnlineTeacher(other), tokenizer=tokenizer, k=k)
        return
    if change == "temperature":
        run["temperature"] = 2.0
    else:
        run["tokenizer"] = copy.deepcopy(tokenizer)
        if change == "template":
            run["tokenizer"].chat_template = "{{ messages }}"
        else:
            vocab = run["tokenizer"].get_vocab()
            swapped = {**vocab, **dict(zip(("a", "b"), (vocab["b"], vocab["a"]), strict=True))}
            run["tokenizer"].get_vocab = lambda: swapped
    with pytest.raises(IdentityError, match=f"{change}.* there and .* here"):
        trainer_for(
            tmp_path, small_model(0), CachedTeacher(tmp_path / "c"), examples, run["tokenizer"],
            temperature=run["temperature"],
        )  # fmt: skip


def test_a_cache_of_hidden_states_serves_every_temperature(tmp_path, examples, teacher, tokenizer):
    source = cached(tmp_path, examples, teacher, tokenizer, mode="hidden")
    source.expect(examples, tokenizer=tokenizer, temperature=3.0)
    rows, inputs, kinds = batch_of(examples)
    student = torch.randn(len(rows), V)
    ours, theirs = (
        span_kl(student, one(rows, **inputs), kinds, temperature=3.0).per_token
        for one in (source, teacher)
    )
    assert isinstance(source(rows, **inputs), Projection)
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4)


def test_weights_batches_and_order_are_not_of_the_signal(tmp_path, examples, teacher, tokenizer):
    source = cached(tmp_path / "c", examples, teacher, tokenizer)
    for settings in ({"reason_weight": 0.5}, {"act_weight": 0.0}, {"divergence": "tvd"},
                     {"per_device_train_batch_size": 3, "seed": 5}):  # fmt: skip
        trainer = trainer_for(
            tmp_path, small_model(0), source, examples[::-1], tokenizer, **settings
        )
        trainer.train()
        assert trainer.state.log_history[0]["reason/kl"] > 0


def test_what_is_missing_is_told_before_the_first_step(tmp_path, examples, teacher, tokenizer):
    source = cached(tmp_path / "c", examples[:5], teacher, tokenizer)
    with pytest.raises(MissingError, match=r"3 of 8 trajectories are not in .*: number 5, 6, 7\."):
        trainer_for(tmp_path, small_model(0), source, examples, tokenizer)
    rows, inputs, _ = batch_of(examples[4:6])
    with pytest.raises(MissingError, match="1 of 2 trajectories are not in"):
        source(rows, **inputs)
    # A row that was not supervised when the cache was made.
    more = [{**examples[0], "span_ids": [1] * (len(examples[0]["span_ids"]) - 1) + [0]}]
    with pytest.raises(MissingError, match="1 of 1 trajectories"):
        source.expect(more, tokenizer=tokenizer, temperature=1.0)


@pytest.mark.parametrize("mode", ["topk", "sampled", "hidden"])
@pytest.mark.parametrize("through", [False, True])
def test_a_batch_without_rows_has_a_signal_of_none(
    tmp_path, examples, teacher, tokenizer, mode, through
):
    """As a rank has it whose last batch of an evaluation is only filled up."""
    source = cached(tmp_path, examples, teacher, tokenizer, mode=mode, k=5)
    if through:
        source = CachedTeacher(tmp_path, teacher, tokenizer=tokenizer, mode=mode, k=5)
    rows, inputs, kinds = batch_of(examples)
    signal = source(rows[:0], **inputs)
    if mode == "hidden":
        assert signal.hidden.shape == (0, 24)
        assert torch.equal(signal.weight, teacher.head.weight)
    else:
        assert signal.ids.shape == signal.logprobs.shape == (0, 5)
    student = torch.randn(0, V, requires_grad=True)
    out = span_kl(student, signal, kinds[:0])
    out.loss.backward()
    assert out.loss.item() == 0
    assert source(rows, **inputs) is not None


def test_each_trajectory_is_read_once_a_batch(tmp_path, examples, teacher, tokenizer, monkeypatch):
    source, read = cached(tmp_path, examples, teacher, tokenizer), []
    original = Shard.read
    monkeypatch.setattr(Shard, "read", lambda shard, i: read.append(i) or original(shard, i))
    rows, inputs, _ = batch_of(examples)
    source(rows, **inputs)
    assert len(read) == len(examples)


def test_a_source_that_does_not_say_who_it_is_is_not_kept(tmp_path, teacher, tokenizer):
    def source(rows, **inputs):
        return teacher(rows, **inputs)

    with pytest.raises(ValueError, match=r"a function has no facts.*: expected an OnlineTeacher"):
        CachedTeacher(tmp_path / "c", source, tokenizer=tokenizer)
    assert not (tmp_path / "c").exists()


def test_hidden_states_without_their_head_are_told(tmp_path, examples, teacher):
    """A store that was killed when it was made."""
    Store.create(tmp_path, Identity("hidden", k=None, temperature=None, vocab=V))
    rows, inputs, _ = batch_of(examples)
    with pytest.raises(DamagedError, match="has no head beside its hidden states: expected"):
        CachedTeacher(tmp_path)(rows[:0], **inputs)


class Counted:
    """A source that counts the sequences it is asked of."""

    def __init__(self, source):
        self.source, self.asked = source, 0

    def facts(self):
        return self.source.facts()

    def __call__(self, rows, **inputs):
        self.asked += len(inputs["input_ids"])
        return self.source(rows, **inputs)


def test_the_first_epoch_writes_and_later_ones_read(tmp_path, examples, teacher, tokenizer):
    source = Counted(teacher)
    through = CachedTeacher(tmp_path, source, tokenizer=tokenizer)
    epochs = []
    for order in ([0, 1, 2, 3, 4, 5, 6, 7, 7], [3, 1, 2, 0, 7, 6, 5, 4]):
        found = {}
        for i in order:
            rows, inputs, _ = batch_of([examples[i]])
            found[i] = through(rows, **inputs)
        epochs.append(found)
        assert source.asked == len(examples)
    through.close()
    assert not Store.open(tmp_path).leftovers()
    assert verify(tmp_path) == []
    epochs.append(
        {
            i: CachedTeacher(tmp_path)(*batch_of([examples[i]])[:1], **batch_of([examples[i]])[1])
            for i in range(8)
        }
    )
    for other in epochs[1:]:
        for i, signal in epochs[0].items():
            assert torch.equal(other[i].logprobs, signal.logprobs)
            assert torch.equal(other[i].ids, signal.ids)


def test_what_training_wrote_before_a_kill_is_kept(tmp_path, examples, teacher, tokenizer):
    through = CachedTeacher(tmp_path, teacher, tokenizer=tokenizer)
    rows, inputs, _ = batch_of(examples[:4])
    expected = through(rows, **inputs)
    through._writer._lock.close()  # as the end of a process does
    source = Counted(teacher)
    again = CachedTeacher(tmp_path, source, tokenizer=tokenizer)
    assert torch.equal(again(rows, **inputs).logprobs, expected.logprobs)
    assert source.asked == 0
    assert len(Store.open(tmp_path)) == 4


def test_rows_of_other_spans_are_asked_beside_those_kept(tmp_path, examples, teacher, tokenizer):
    source = Counted(teacher)
    through = CachedTeacher(tmp_path, source, tokenizer=tokenizer)
    rows, inputs, kinds = batch_of(examples[:1])
    first = through(rows[kinds == 1], **inputs)
    second = through(rows[kinds == 2], **inputs)
    both = through(rows, **inputs)
    assert source.asked == 2
    assert torch.equal(both.ids[kinds == 1], first.ids)
    assert torch.equal(both.ids[kinds == 2], second.ids)


def test_damage_is_met_where_it_is_and_nowhere_else(tmp_path, examples, teacher, tokenizer):
    cached(tmp_path, examples, teacher, tokenizer)
    (file,) = (tmp_path / "shards").iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    source = CachedTeacher(tmp_path)
    found, refused = [], []
    for example in examples:
        rows, inputs, _ = batch_of([example])
        try:
            found.append(source(rows, **inputs))
        except DamagedError as error:
            refused.append(str(error))
    assert all(isinstance(signal, TopK) for signal in found)
    assert len(found) == len(examples) - 1
    assert str(file) in refused[0]


# The online teacher, wherever it stands.


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_micro_batches_give_the_same_rows(examples, teacher, batch_size):
    rows, inputs, _ = batch_of(examples)
    rows = rows[(rows // inputs["input_ids"].shape[1]) != 2]  # one sequence has none
    whole = teacher(rows, **inputs)
    found = OnlineTeacher(teacher.model, batch_size=batch_size)(rows, **inputs)
    torch.testing.assert_close(found.hidden, whole.hidden, rtol=1e-5, atol=1e-6)
    assert found.weight is teacher.model.lm_head.weight or found.weight.data_ptr() == (
        teacher.model.lm_head.weight.data_ptr()
    )


def test_an_offloaded_teacher_says_and_is_the_same(examples, teacher):
    rows, inputs, _ = batch_of(examples)
    expected, revision = teacher(rows, **inputs), fingerprint(teacher.model)
    model = cpu_offload(copy.deepcopy(teacher.model), torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    offloaded = OnlineTeacher(model)
    found = offloaded(rows, **inputs)
    assert torch.equal(found.hidden, expected.hidden)
    assert torch.equal(found.weight, expected.weight)
    assert fingerprint(model) == revision
    assert all(parameter.is_meta for parameter in model.parameters())


def test_every_weight_counts_for_the_revision(teacher):
    revision = fingerprint(teacher.model)
    assert revision == fingerprint(copy.deepcopy(teacher.model))
    for name, parameter in copy.deepcopy(teacher.model).named_parameters():
        other = copy.deepcopy(teacher.model)
        bits = other.get_parameter(name).data.view(-1).view(torch.int32)
        bits[parameter.numel() // 3] ^= 1
        assert fingerprint(other) != revision, name


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_what_a_quantised_teacher_costs_is_measured_and_told(
    tmp_path, examples, caplog, quantization
):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    small_model(1, hidden=64, scale=3.0).save_pretrained(tmp_path)
    found = load_teacher(tmp_path, quantization=quantization, sample=examples)
    (line,) = [r.getMessage() for r in caplog.records if "KL to the whole one" in r.getMessage()]
    whole = load_teacher(tmp_path)
    rows, inputs, _ = batch_of(examples)
    logp, logq = (
        (s.hidden.double() @ s.weight.double().T).log_softmax(-1)
        for s in (whole(rows, **inputs), found(rows, **inputs))
    )
    kl = (logp.exp() * (logp - logq)).sum(-1).mean().item()
    assert 0 < kl < 0.1
    assert f"KL to the whole one is {kl:.4f} nats" in line
    measured = quantization_loss(said(whole, examples, "cpu"), said(found, examples, "cpu"))
    assert measured["agreement"] == pytest.approx(
        (logp.argmax(-1) == logq.argmax(-1)).double().mean().item()
    )


# Ahead of the student.


def batches(count):
    return [{"rows": torch.tensor([0]), "input_ids": torch.tensor([[i]])} for i in range(count)]


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_at_most_depth_signals_wait_and_each_goes_to_its_batch(depth):
    made, taken, most = [], [], []

    def source(rows, **inputs):
        made.append(inputs["input_ids"].item())
        most.append(len(made) - len(taken))
        return inputs["input_ids"].flatten()[rows, None].float()

    ahead = Ahead(source, depth)
    for i, batch in enumerate(ahead.over(iter(batches(9)))):
        signal = batch["teacher"].result()
        taken.append(i)
        assert signal.item() == i
        assert batch["input_ids"].item() == i
    ahead.close()
    assert made == list(range(9))
    # The one that is being taken, beside those that wait.
    assert max(most) <= depth + 1


def test_the_teacher_works_while_the_student_does():
    """The pass of batch n + 1 begins before batch n is done with."""
    begun = threading.Event()

    def source(rows, **inputs):
        if inputs["input_ids"].item() == 1:
            begun.set()
        return torch.zeros(1, 1)

    ahead = Ahead(source, 1)
    stream = ahead.over(iter(batches(3)))
    next(stream)["teacher"].result()
    assert begun.wait(10)
    ahead.close()  # with two that nobody has taken


def test_what_goes_wrong_ahead_is_raised_where_it_is_needed():
    def source(rows, **inputs):
        if inputs["input_ids"].item() == 1:
            raise OSError("the disk is gone")
        return torch.zeros(1, 1)

    ahead = Ahead(source, 1)
    stream = ahead.over(iter(batches(3)))
    next(stream)["teacher"].result()
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)["teacher"].result()
    next(stream)["teacher"].result()
    ahead.close()
    (last,) = [batch["teacher"] for batch in Ahead(source, 1).over(iter(batches(1)))]
    assert last.result().shape == (1, 1)


def test_what_was_dropped_says_so_and_the_next_run_is_no_further_ahead():
    """Those that were closed upon, whether made, waiting for room or queued, count for no other."""
    made = []

    def source(rows, **inputs):
        made.append(inputs["input_ids"].item())
        return torch.zeros(1, 1)

    ahead = Ahead(source, 2)
    begun = [ahead._begin(batch) for batch in batches(6)]
    begun[1]._future.result()
    ahead.close()
    assert made == [0, 1]
    for signal in begun[:2]:
        assert signal.result().shape == (1, 1)
    for signal in begun[2:]:
        with pytest.raises(RuntimeError, match="closed while a batch was waiting for it"):
            signal.result()
    made.clear()
    begun = [ahead._begin(batch) for batch in batches(6)]
    begun[1]._future.result()
    time.sleep(0.2)  # in which a third would be made
    assert made == [0, 1]
    begun[0].result()
    begun[2]._future.result()
    assert made == [0, 1, 2]
    ahead.close()


class Stream:
    """Of a device that is not there; each counts."""

    made = 0

    def __init__(self, device):
        type(self).made += 1

    def wait_event(self, event):
        pass


def test_a_device_has_one_stream_for_all_batches(monkeypatch):
    """The allocator keeps what a stream has freed for that stream."""
    event = SimpleNamespace(record=lambda stream: None)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream)
    ahead = Ahead(lambda rows, **inputs: torch.zeros(1, 1), 2)
    for _ in range(2):
        for index in (0, 0, 1, 0):
            batch = {"rows": SimpleNamespace(device=torch.device("cuda", index))}
            ahead._begin(batch)._future.result()
            ahead.close()
    assert Stream.made == 2


@pytest.mark.parametrize("accumulate", [1, 3])
def test_ahead_or_not_the_run_is_the_same(tmp_path, examples, teacher, tokenizer, accumulate):
    runs = []
    for depth in (0, 1, 4):
        trainer = trainer_for(
            tmp_path, small_model(0), teacher, examples, tokenizer, teacher_lookahead=depth,
            per_device_train_batch_size=2, max_steps=6, gradient_accumulation_steps=accumulate,
            eval_strategy="steps", eval_steps=2, eval_dataset=examples[:3],
        )  # fmt: skip
        trainer.train()
        runs.append([repeatable(log) for log in trainer.state.log_history])
    assert runs[0] == runs[1] == runs[2]
