"""A real training step, of which everything but the numbers happens: `FakeTensorMode` and torch's
own memory tracker.

`SADTrainer`'s step runs as on a GPU, on tensors that have sizes and no contents, and the tracker
adds up what is alive. What would need contents is stood in for: kernels, which write into what
they are given; the products of the chunk loop, whose results have their places already; what a
model does after its head, which is tried with numbers. Fake tensors say they are on the CPU, since
a torch without CUDA has none on a GPU; what sadkern does differently there is done as for a GPU.
"""

from __future__ import annotations

import math
import tempfile
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker

from sadkern import backends, ops, projection, tiles
from sadkern.backends import reference
from sadkern.plan.models import config_of, empty_model, linear_layers
from sadkern.plan.setting import Setting
from sadkern.plan.sharded import ranks
from sadkern.sides import Projection, TopK
from sadkern.teacher import online
from sadkern.train import SADConfig, SADTrainer, trainer
from sadkern.train.setup import shard_teacher

KINDS = {  # a tracker's, and what they are here
    **dict.fromkeys(("PARAM", "BUFFER", "SHARDED_PARAM", "INP"), "weights"),
    **dict.fromkeys(("GRAD", "SHARDED_GRAD"), "gradients"),
    "OPT": "optimizer",
}
Step = Callable[[SADTrainer, Any, dict[str, Tensor]], Any]


class Tracked(NamedTuple):
    """Bytes at the step's worst moment, and of what."""

    peak: int
    weights: int
    gradients: int
    optimizer: int
    rest: int


def tracked(setting: Setting, *, student: Any = None, step: Step | None = None) -> Tracked:
    """Of the second step, when the optimizer has its state. `student`: a config in place of that
    of the setting's. `step`: another than `SADTrainer`'s, given the trainer, its model and a batch;
    its teacher is the trainer's. ValueError: cards that share no weights, whose buckets are torch's
    own business."""
    if setting.gpus > 1 and not setting.fsdp:
        raise ValueError("a step is tracked of one card or of FSDP2: expected --fsdp or --gpus 1")
    if setting.optimizer == "adamw8bit":
        _make_tables()
    with ExitStack() as stack:
        stack.enter_context(_without_contents())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        made = trainer_of(setting, empty_model(student or config_of(setting.student)))
        model: Any = made.model
        if setting.fsdp:
            known = stack.enter_context(ranks(setting.gpus))
            fsdp2_prepare_model(known, model)
            shard_teacher(made.teacher, known)
        optimizer: Any = made.create_optimizer()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        held = _held_by(made.teacher)
        if setting.fsdp:
            tracker: Any = ShardedTracker(model, optimizer)
            tracker.track_inputs(tuple(x for y in held for x in (*y.parameters(), *y.buffers())))
        else:
            tracker = Tracker()
            tracker.track_external(model, optimizer, *held)
        batch = batch_of(setting)
        with tracker:
            (step or training_step)(made, model, batch)
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    of: Counter[str] = Counter()
    peak.pop("Total")
    for kind, count in peak.items():
        of[KINDS.get(str(kind).rpartition(".")[2], "rest")] += count
    return Tracked(sum(of.values()), of["weights"], of["gradients"], of["optimizer"], of["rest"])


class _Brief:
    """A tracker that does not, at every operator, ask each module for a peak of its own."""

    memory_tracking: Any

    def _update_peak_stats(self, *args: Any) -> None:
        modules = self.memory_tracking
        self.memory_tracking = type(modules)()
        super()._update_peak_stats(*args)  # type: ignore[misc]
        self.memory_tracking = modules


class ShardedTracker(_Brief, FSDPMemTracker):
    """Of a rank under FSDP2."""


class Tracker(_Brief, MemTracker):
    """That does not ask frozen weights for their gradients."""

    def _track_module_params_and_buffers(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nothing = types.SimpleNamespace(remove=lambda: None)
        for parameter in module.parameters():
            if not parameter.requires_grad:
                self._param_to_grad_hook_handles[parameter] = (nothing, nothing)
        return super()._track_module_params_and_buffers(module, *args, **kwargs)


def training_step(made: SADTrainer, model: nn.Module, batch: dict[str, Tensor]) -> None:
    """`SADTrainer`'s, and the optimizer's."""
    made.training_step(model, batch, torch.full((2,), len(batch["rows"]) / 2))
    finish_step(made, model)


def finish_step(made: SADTrainer, model: nn.Module) -> None:
    """Has the optimizer step, unless it has in the backward pass."""
    if not made.args.optimizer_in_backward and made.optimizer is not None:
        made.optimizer.step()
        model.zero_grad()


def trainer_of(setting: Setting, student: Any, *, use_cpu: bool = True) -> SADTrainer:
    """Of a model and the setting's teacher."""
    options: dict[str, Any] = {}
    if setting.optimizer == "adamw8bit":
        options = {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True"}
    else:
        options = {"optim": "adamw_torch_fused"}
    args = SADConfig(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=setting.batch,
        optimizer_in_backward=setting.in_backward,
        max_grad_norm=0,
        teacher_lookahead=0,
        report_to=[],
        use_cpu=use_cpu,
        disable_tqdm=True,
        **options,
    )
    adapters = None
    if setting.method == "lora":
        from peft import LoraConfig

        adapters = LoraConfig(r=setting.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    made = SADTrainer(student, _source(setting), args, peft_config=adapters)
    model: Any = made.model
    if setting.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if adapters is not None:
            model.enable_input_require_grads()
    return made


def batch_of(setting: Setting) -> dict[str, Tensor]:
    """Its first rows are supervised, reasoning and acting in turns."""
    shape = (setting.batch, setting.seq_len)
    rows = torch.arange(setting.rows)
    span_ids = torch.zeros(setting.tokens, dtype=torch.int64)
    span_ids[: setting.rows] = 1 + rows % 2
    return {
        "input_ids": torch.ones(shape, dtype=torch.int64),
        "attention_mask": torch.ones(shape, dtype=torch.int64),
        "span_ids": span_ids.view(shape),
        "rows": rows,
    }


def _make_tables() -> None:
    """An 8-bit optimizer's, of numbers, which it makes once."""
    from torchao.optim.subclass_8bit import OptimState8bit

    for signed in (True, False):
        OptimState8bit.zeros((256,), signed)


# Teachers.


class Likely:
    """Says `k` tokens a row."""

    def __init__(self, k: int):
        self.k = k

    def __call__(self, rows: Tensor, **inputs: Any) -> TopK:
        ids = torch.arange(self.k, dtype=torch.int32).repeat(len(rows), 1)
        none = torch.zeros(len(rows))
        return TopK(ids, torch.full(ids.shape, -math.log(self.k)), none, none.clone())


class Hidden:
    """Says hidden states; its head stays."""

    def __init__(self, head: nn.Module):
        self.head = head.requires_grad_(False)

    def __call__(self, rows: Tensor, **inputs: Any) -> Projection:
        weight: Any = self.head.weight
        return Projection(weight.new_empty(len(rows), weight.shape[1]), weight)


def _held_by(teacher: Any) -> list[nn.Module]:
    found = getattr(teacher, "model", None) or getattr(teacher, "head", None)
    return [] if found is None else [found]


class FourBit(nn.Module):
    """What a matrix in NF4 is in memory: half a byte an entry and, for 64 of them, a byte of scale,
    whose own scales are one fp32 for 256. It is multiplied as bf16, whole."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        weight: Any = linear.weight
        self.shape, self.dtype, count = weight.shape, weight.dtype, weight.numel()
        for name, size, dtype in (
            ("packed", count // 2, torch.uint8),
            ("scales", count // 64, torch.uint8),
            ("of_scales", count // (64 * 256), torch.float32),
        ):
            self.register_buffer(name, torch.zeros(size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, torch.empty(self.shape, dtype=self.dtype))


def _source(setting: Setting) -> Any:
    if setting.likely:
        return Likely(setting.k)
    teacher = empty_model(config_of(setting.teacher))
    if setting.teacher_source == "hidden":
        return Hidden(teacher.get_output_embeddings())
    if setting.teacher_source == "online-4bit":
        chosen = set(linear_layers(teacher))
        for module in list(teacher.modules()):
            for name, child in module.named_children():
                if child in chosen:
                    setattr(module, name, FourBit(child))
    return online.OnlineTeacher(teacher)


# Stand-ins.


def _plain_projection(model: Any) -> Projection:
    head = model.get_output_embeddings()
    weight, bias = head.weight.detach(), getattr(head, "bias", None)
    return Projection(weight.new_empty(0, weight.shape[1]), weight, bias, 1.0, None)


def _divergence_rows(student: Any, teacher: Any, supervised: Tensor, *_: Any, **__: Any) -> Any:
    value = torch.empty(supervised.shape)
    agreement = torch.empty(supervised.shape, dtype=torch.bool)
    return reference.RowValues(value, value.clone(), value.clone(), agreement, value.clone())


def _multiply(out: Tensor, *_: Any) -> None:
    out.zero_()


def _looked_into(tracker: Any, operator: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
    """The body of `sadkern::span_kl`, which a mode would else take for one piece."""
    with tracker:
        return ops.span_kl._init_fn(*args, **(kwargs or {}))


for _tracker in (Tracker, ShardedTracker):
    torch.library.register_torch_dispatch("sadkern::span_kl", _tracker, _looked_into)


@contextmanager
def _without_contents() -> Iterator[None]:
    backend: Any = types.ModuleType("without_contents")
    backend.empty, backend.divergence_rows = reference.empty, _divergence_rows
    backend.scale_ = lambda *_: None
    stand_ins = [
        (nn.Module, "to", lambda model, *_, **__: model),  # fake tensors are not exchanged
        (backends, "choose", lambda *_: backend),
        (ops, "check_values", lambda *_: None),
        (tiles, "multiplies_halves", lambda _: True),
        (tiles, "multiply", _multiply),
        (
            projection,
            "tile_bytes",
            lambda _, summed=0, real=projection.tile_bytes: real("cuda", summed),
        ),
        (online, "head_projection", _plain_projection),
        (trainer, "projection_of", _plain_projection),
        (SADTrainer, "_check_finite", lambda *_: None),
        # An 8-bit optimizer compiles its update, which then is one kernel and writes in place.
        (torch, "compile", lambda *_, **__: lambda *_: None),
    ]
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for where, name, value in stand_ins:
            stack.enter_context(patch.object(where, name, value))
        yield
