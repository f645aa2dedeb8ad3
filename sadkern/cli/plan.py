"""`sadkern plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from sadkern.cli.app import app, told


@app.command()
def plan(
    student: Annotated[
        str, typer.Option(help="A model of the paper, such as llama-7b, or a folder.")
    ] = "llama-7b",
    teacher: Annotated[str, typer.Option(help="Its teacher, named alike.")] = "llama-13b",
    gpu: Annotated[
        str, typer.Option(help="Such as a6000 or h100, or its memory in GiB.")
    ] = "a6000",
    method: Annotated[
        str, typer.Option(help="full (all weights are trained) or lora (adapters).")
    ] = "full",
    teacher_source: Annotated[
        str, typer.Option(help="online, online-4bit, cached, hidden or served.")
    ] = "cached",
    optimizer: Annotated[
        str, typer.Option(help="adamw, or adamw8bit (states in 8 bits, stochastic rounding).")
    ] = "adamw8bit",
    batch: Annotated[int, typer.Option(help="Trajectories of a step.")] = 8,
    seq_len: Annotated[int, typer.Option(help="Tokens of a trajectory.")] = 512,
    supervised: Annotated[
        float, typer.Option(help="Share of the tokens that carries a loss.")
    ] = 1.0,
    k: Annotated[int, typer.Option(help="Tokens of a cached or served teacher.")] = 64,
    rank: Annotated[int, typer.Option(help="Rank of the adapters of lora.")] = 16,
    in_backward: Annotated[
        bool | None,
        typer.Option(
            help="Whether weights are updated as soon as their gradient is there. Default: where "
            "that is possible and of use, full on one card."
        ),
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option(help="Whether activations are computed again in the backward pass.")
    ] = True,
    gpus: Annotated[int, typer.Option(help="Cards, each with such a batch.")] = 1,
    fsdp: Annotated[
        bool, typer.Option(help="They share the models' weights (FSDP2); else each has all (DDP).")
    ] = False,
    track: Annotated[
        bool, typer.Option(help="Also run the step on tensors without contents (a minute).")
    ] = False,
    compare: Annotated[
        bool, typer.Option(help="Also with whole logits and with the losses of TRL and Liger.")
    ] = False,
    json: Annotated[bool, typer.Option(help="Bytes, for machines.")] = False,
) -> None:
    """Work out what a training step takes of a GPU's memory, and whether it fits. No GPU needed.

    sadkern plan --student llama-7b --teacher llama-13b --teacher-source online-4bit --batch 4
    """
    from sadkern.plan.script import main as run
    from sadkern.plan.setting import Setting

    if in_backward is None:
        in_backward = method == "full" and gpus == 1
    with told():
        setting = Setting(
            student=student, teacher=teacher, method=method, teacher_source=teacher_source,
            optimizer=optimizer, in_backward=in_backward, checkpointing=checkpointing, batch=batch,
            seq_len=seq_len, supervised=supervised, k=k, rank=rank, gpus=gpus, fsdp=fsdp,
        )  # fmt: skip
        run(setting, gpu, track=track, compare=compare, as_json=json)
