"""However a global batch is split, over ranks, accumulated steps and packs, its gradient is that of
the whole; sharded weights are gathered and scattered once."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from several import GROUPS
from small_models import small_model
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bench.ranks
from sadkern import Projection, span_kl
from sadkern.data import SpanCollator, inputs_of, next_tokens, sequence_part
from sadkern.forward import head_projection, supervised_loss
from sadkern.plan.sharded import known_of
from sadkern.spans import ACT, REASON
from sadkern.teacher import OnlineTeacher

Example = dict[str, list[int]]
REDUCTIONS = ("span_mean", "token_mean", "sum")


def trajectories(seed: int) -> list[Example]:
    """Of any length; some have no supervised row."""
    rng = random.Random(seed)
    made = []
    for _ in range(9):
        length = rng.randint(2, 12)
        kinds = [0] if rng.random() < 0.3 else [0, REASON, ACT]
        made.append({
            "input_ids": [rng.randrange(1, 300) for _ in range(length)],
            "span_ids": [rng.choice(kinds) for _ in range(length - 1)] + [0],
        })  # fmt: skip
    made[0]["span_ids"][0] = REASON
    return made


def split(examples: list[Example], ranks: int, steps: int, seed: int) -> list[list[list[Example]]]:
    """[ranks][steps]: micro-batches of any size. One that would be empty has nothing supervised."""
    rng = random.Random(seed)
    parts: list[list[list[Example]]] = [[[] for _ in range(steps)] for _ in range(ranks)]
    alone = rng.randrange(ranks)  # has nothing to learn from, if there are others
    for example in examples:
        among = [
            r for r in range(ranks) if r != alone or ranks == 1 or not any(example["span_ids"])
        ]
        rng.choice(parts[rng.choice(among)]).append(example)
    nothing = {"input_ids": [1, 2], "span_ids": [0, 0]}
    return [[part or [nothing] for part in of_rank] for of_rank in parts]


def normaliser(examples: list[Example], reduction: str, ranks: int) -> Any:
    """Of the global batch, per rank, since gradients of ranks are averaged."""
    counts = [sum(x["span_ids"].count(kind) for x in examples) / ranks for kind in (REASON, ACT)]
    return {"span_mean": counts, "token_mean": [sum(counts)], "sum": None}[reduction]


def backward(
    model: Any, projection: Any, teacher: Any, examples: list[Example], packed: bool,
    reduction: str, count: Any, chunk_rows: int | None = None,
) -> None:  # fmt: skip
    batch = SpanCollator(0, packed=packed)(examples)
    rows, inputs = batch["rows"], inputs_of(batch)
    signal, kinds = teacher(rows, **inputs), batch["span_ids"].flatten()[rows]

    def loss_of(own: Any) -> Tensor:
        return span_kl(
            own, signal, kinds, num_tokens=count, reduction=reduction, chunk_rows=chunk_rows
        ).loss

    supervised_loss(model, rows, loss_of, projection, **inputs).backward()


def in_double(seed: int) -> Any:
    """A Llama's own norms are in fp32 whatever it is."""
    model = small_model(seed).double()
    for name, module in list(model.named_modules()):
        if name.endswith("norm"):
            parent, _, own = name.rpartition(".")
            norm = torch.nn.RMSNorm(module.weight.shape, eps=1e-6, dtype=torch.float64)
            setattr(model.get_submodule(parent), own, norm)
    return model


def models() -> tuple[Any, Any]:
    return in_double(0), OnlineTeacher(in_double(1))


def drawn(seed: int) -> tuple[int, str]:
    """Steps that are accumulated, and a reduction."""
    rng = random.Random(seed)
    return rng.choice((1, 2, 3)), rng.choice(REDUCTIONS)


def on_rank(rank: int, ranks: int, seed: int) -> dict[str, Tensor]:
    steps, reduction = drawn(seed)
    examples = trajectories(seed)
    student, teacher = models()
    ddp = DistributedDataParallel(student, process_group=GROUPS[ranks])
    own = split(examples, ranks, steps, seed)[rank]
    count = normaliser(examples, reduction, ranks)
    packed = random.Random(f"{seed} {rank}")
    for i, part in enumerate(own):
        with ddp.no_sync() if i < steps - 1 else nullcontext():
            backward(
                ddp,
                head_projection(student),
                teacher,
                part,
                packed.random() < 0.5,
                reduction,
                count,
            )
    # The sum over ranks, for no count says by how much their mean is to be larger.
    share = ranks if reduction == "sum" else 1
    return {name: share * p.grad for name, p in student.named_parameters()}


def whole(seed: int) -> dict[str, Tensor]:
    _, reduction = drawn(seed)
    examples = trajectories(seed)
    student, teacher = models()
    backward(student, head_projection(student), teacher, examples, False, reduction, None)
    return {name: p.grad for name, p in student.named_parameters()}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_split_of_a_batch_gives_its_gradient(several, ranks):
    for seed in range(100 * ranks, 100 * ranks + 8):
        expected = whole(seed)
        for found in several.run(ranks, on_rank, ranks, seed):
            assert_same(found, expected)


def test_splits_are_of_all_kinds():
    """That the test above has had ranks without a row, and steps with and without."""
    kinds: Counter[str] = Counter()
    for ranks in (2, 3, 4):
        for seed in range(100 * ranks, 100 * ranks + 8):
            for of_rank in split(trajectories(seed), ranks, 2, seed):
                learns = [any(any(x["span_ids"]) for x in part) for part in of_rank]
                kinds["no row" if not any(learns) else "some" if not all(learns) else "all"] += 1
    assert min(kinds["no row"], kinds["some"], kinds["all"]) > 5


class Messages(TorchDispatchMode):
    """What c10d is told to send: the operation and how many numbers go in and come out."""

    def __init__(self):
        super().__init__()
        self.sent: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None):
        name = operator._schema.name
        if name.startswith("c10d::"):
            sizes = [sum(x.numel() for x in tree_leaves(y) if isinstance(x, Tensor)) for y in args]
            self.sent.append((name.removeprefix("c10d::"), sizes[1], sizes[0]))
        return operator(*args, **(kwargs or {}))


def sharded_on_rank(rank: int, chunk_rows: int | None) -> tuple[list[tuple[str, int, int]], Any]:
    """FSDP2 as accelerate arranges it: layers, embedding, and the last norm with the head."""
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("ranks",))
    student, teacher = models()
    projection = head_projection(student)
    fsdp2_prepare_model(known_of(mesh), student)
    examples = trajectories(0)
    count = normaliser(examples, "span_mean", 4)
    own = [x for part in split(examples, 4, 1, 0)[rank] for x in part]
    with Messages() as messages:
        backward(student, projection, teacher, own, False, "span_mean", count, chunk_rows)
    return messages.sent, {name: p.grad.full_tensor() for name, p in student.named_parameters()}


@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_a_sharded_head_is_gathered_and_scattered_once_a_step(several, chunk_rows):
    model = in_double(0)
    sizes = {name: sum(x.numel() for x in m.parameters()) for name, m in model.named_modules()}
    layers = [sizes[f"model.layers.{i}"] for i in range(2)]
    tail = sizes["lm_head"] + sizes["model.norm"]
    embedding = sizes["model.embed_tokens"]
    expected = None
    for sent, gradients in several.run(4, sharded_on_rank, chunk_rows):
        gathered = [out for name, _, out in sent if "gather" in name]
        scattered = [into for name, into, _ in sent if "scatter" in name]
        assert len(gathered) + len(scattered) == len(sent)
        # Layers and embedding twice, for the forward and the backward pass; what follows them once.
        assert Counter(gathered) == Counter([*layers, *layers, embedding, embedding, tail])
        assert Counter(scattered) == Counter([*layers, embedding, tail])
        if expected is None:
            student, teacher = models()
            head = head_projection(student)
            backward(student, head, teacher, trajectories(0), False, "span_mean", None)
            expected = {name: p.grad for name, p in student.named_parameters()}
        assert_same(gradients, expected)


def of_sequences_on_rank(
    rank: int, ranks: int, packed: bool
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """The loss and the gradient of a model that sees one token at a time, on a part of each
    sequence; and the part."""
    torch.manual_seed(0)
    embedding, head, theirs = (torch.randn(300, 8, dtype=torch.float64) for _ in range(3))
    embedding.requires_grad_()
    head.requires_grad_()
    own = SpanCollator(0, packed=packed)(trajectories(3))
    if ranks:
        own = sequence_part(own, rank, ranks)
    else:
        own["labels"], own["num_tokens"] = next_tokens(own), None
    hidden = embedding[own["input_ids"]]
    loss = span_kl(
        Projection(hidden, head), Projection(hidden.detach(), theirs), own["span_ids"],
        rows=own["rows"], labels=own["labels"], ce_weight=0.5, num_tokens=own["num_tokens"],
    ).loss  # fmt: skip
    loss.backward()
    return loss.detach(), [embedding.grad, head.grad], own


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 40])
def test_parts_of_sequences_add_up_to_the_whole(packed, ranks):
    """Whose next tokens may be another rank's, and of whom one may have nothing to learn from."""
    loss, gradient, batch = of_sequences_on_rank(0, 0, packed)
    losses, gradients, parts = zip(
        *(of_sequences_on_rank(rank, ranks, packed) for rank in range(ranks)), strict=True
    )
    torch.testing.assert_close(sum(losses), loss)
    for whole, *each in zip(gradient, *gradients, strict=True):
        torch.testing.assert_close(sum(each), whole)
    for name in ("input_ids", "span_ids", "labels"):
        assert torch.equal(torch.cat([part[name] for part in parts], 1), batch[name])
    labels = batch["labels"].flatten()
    assert torch.equal(labels[batch["rows"]], batch["input_ids"].flatten()[batch["rows"] + 1])
    # Each trajectory has one token that is followed by none; so has padding.
    ends = (labels == -100).sum()
    padding = 0 if packed else (batch["attention_mask"] == 0).sum()
    assert ends == len(trajectories(3)) + padding
    if ranks == 40:
        assert sum(len(part["rows"]) == 0 for part in parts) > 0


def test_what_is_sent_is_the_least_that_has_to_be():
    for name, found, ideal in bench.ranks.measured(2):
        assert found.sent == pytest.approx(ideal, rel=1e-3), name
        assert (ideal == 0) == (name == "alone")


def taken_on_rank(rank: int, ranks: int, folder: str, begin: int, end: int) -> dict[str, Tensor]:
    """Steps `begin` to `end` of a sharded student; begun anew from what others have saved in
    `folder`, where some are done, and saved there."""
    mesh = DeviceMesh.from_group(GROUPS[ranks], "cpu", mesh_dim_names=("ranks",))
    student, teacher = models()
    projection = head_projection(student)
    fsdp2_prepare_model(known_of(mesh), student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    if begin:
        weights, states = get_state_dict(student, optimizer)
        kept = {"weights": weights, "states": states}
        checkpoint.load(kept, checkpoint_id=folder, process_group=GROUPS[ranks])
        set_state_dict(
            student, optimizer, model_state_dict=kept["weights"],
            optim_state_dict=kept["states"],
        )  # fmt: skip
    for step in range(begin, end):
        examples = trajectories(step)
        own = split(examples, ranks, 1, step)[rank][0]
        count = normaliser(examples, "span_mean", ranks)
        backward(student, projection, teacher, own, False, "span_mean", count)
        optimizer.step()
        optimizer.zero_grad()
    weights, states = get_state_dict(student, optimizer)
    kept = {"weights": weights, "states": states}
    checkpoint.save(kept, checkpoint_id=folder, process_group=GROUPS[ranks])
    return {name: p.detach().full_tensor() for name, p in student.named_parameters()}


def test_a_checkpoint_of_four_ranks_goes_on_in_two_and_in_three(several, tmp_path):
    student, teacher = models()
    projection, optimizer = head_projection(student), torch.optim.AdamW(student.parameters(), 1e-2)
    for step in range(6):
        backward(student, projection, teacher, trajectories(step), False, "span_mean", None)
        optimizer.step()
        optimizer.zero_grad()
    folder = str(tmp_path / "checkpoint")
    several.run(4, taken_on_rank, 4, folder, 0, 2)
    several.run(2, taken_on_rank, 2, folder, 2, 4)
    for found in several.run(3, taken_on_rank, 3, folder, 4, 6):
        for name, weight in student.named_parameters():
            torch.testing.assert_close(found[name], weight.detach(), rtol=1e-6, atol=1e-9)
