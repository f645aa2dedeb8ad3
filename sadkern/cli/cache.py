"""`sadkern cache` and what goes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sadkern.cli.app import GOES_ON, app, told
from sadkern.spans import PROFILES

cache = typer.Typer(
    help="""Keep a teacher's signal on disk, so that training needs no teacher.

    sadkern cache --model Qwen/Qwen3-8B --data trajectories.jsonl --k 64 --output cache/

    sadkern train --model_name_or_path Qwen/Qwen3-0.6B --teacher_cache cache/ ..

    Interrupted, the same command goes on. Processes started together share the work.

    What is there already is not computed again.""",
    invoke_without_command=True,
    no_args_is_help=True,
)
app.add_typer(cache, name="cache")
ShardMiB = Annotated[float, typer.Option(min=0.001, help="Size of a file, in MiB.")]
StorePath = Annotated[Path, typer.Argument(help="What `sadkern cache --output` named.")]


@cache.callback()
def write(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="The teacher: a folder or a hub's name; a server's name.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="Trajectories: JSON Lines; may be given repeatedly.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where the cache is made.")] = None,
    k: Annotated[int, typer.Option(min=1, help="Tokens that are kept of a row (or drawn).")] = 64,
    mode: Annotated[
        str,
        typer.Option(
            help="topk; hidden (last hidden states and the head: exact, 2 D bytes a token); "
            "sampled (k draws: unbiased gradients)."
        ),
    ] = "topk",
    temperature: Annotated[float, typer.Option(help="Divides the logits; that of training.")] = 1.0,
    tokenizer: Annotated[str | None, typer.Option(help="If not the model's own.")] = None,
    profile: Annotated[
        str,
        typer.Option(
            help=f"How trajectories are written: auto, {', '.join(PROFILES)} or a .yaml file."
        ),
    ] = "auto",
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a trajectory, as in training.")
    ] = 512,
    truncation: Annotated[str, typer.Option(help="As in training: right, left, drop, split.")] = (
        "right"
    ),
    supervise_markers: Annotated[
        bool,
        typer.Option(
            "--supervise-markers", help="Also 'Thought:', 'Action:' and the like, as in training."
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Trajectories at a time.")] = 8,
    dtype: Annotated[
        str, typer.Option(help="Of the teacher's weights; auto: as they are saved.")
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="Where the teacher runs: auto, cuda:1, cpu, ..")
    ] = "auto",
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep the teacher's weights in the host's memory.")
    ] = False,
    quantization: Annotated[
        str | None, typer.Option(help="8bit or 4bit; what it costs in KL is measured.")
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="A server's address in place of a model loaded here.")
    ] = None,
    server_kind: Annotated[str, typer.Option(help="vllm, sglang or openai.")] = "vllm",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests to the server at a time.")] = 8,
    timeout: Annotated[float, typer.Option(help="Seconds until it has answered.")] = 300.0,
    shard_mib: ShardMiB = 128.0,
) -> None:
    if context.invoked_subcommand:
        return
    if not data or output is None:
        raise typer.BadParameter("expected --data FILE and --output DIR")
    from sadkern.teacher.script import write as run

    with told(GOES_ON):
        run(
            output, data, model=model, server=server, tokenizer=tokenizer, mode=mode, k=k,
            temperature=temperature, batch_size=batch_size, shard_mib=shard_mib,
            reading={"profile": profile, "max_length": max_length, "truncation": truncation,
                     "supervise_markers": supervise_markers},
            loading={"device": device, "offload": offload, "quantization": quantization,
                     "dtype": dtype},
            serving={"kind": server_kind, "batch_size": batch_size, "concurrency": concurrency,
                     "timeout": timeout},
        )  # fmt: skip


@cache.command("info")
def cache_info(
    path: StorePath,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what a cache holds: whose signal, of how much, in how many bytes.

    sadkern cache info cache/
    """
    from sadkern.teacher.script import info as run

    with told():
        run(path, as_json)


@cache.command()
def verify(
    path: StorePath,
    drop: Annotated[
        bool, typer.Option("--drop", help="Set damaged files aside, so that they are made again.")
    ] = False,
) -> None:
    """Read every byte of a cache and name the files that are not as they were written.

    sadkern cache verify cache/ --drop

    Exit status: 1 where there are any, else 0.
    """
    from sadkern.teacher.script import check as run

    with told():
        status = run(path, drop)
    raise typer.Exit(status)


@cache.command()
def merge(
    sources: Annotated[list[Path], typer.Argument(help="Caches of the same signal.")],
    output: Annotated[Path, typer.Option(help="Where the cache of all is made.")],
    shard_mib: ShardMiB = 128.0,
) -> None:
    """Make one cache of several, each trajectory once, in files of even size.

    sadkern cache merge part-0/ part-1/ --output cache/
    """
    from sadkern.teacher.script import join as run

    with told():
        run(sources, output, shard_mib)


@cache.command("import")
def import_captures(
    files: Annotated[
        list[Path], typer.Argument(help="Parquet; of axolotl's columns JSON Lines too.")
    ],
    format: Annotated[str, typer.Option(help="Whose captures: distillkit or axolotl.")],
    output: Annotated[Path, typer.Option(help="Where the cache is made or added to.")],
    teacher: Annotated[str, typer.Option(help="The model that gave them, by name.")],
    revision: Annotated[str | None, typer.Option(help="The model's revision.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="The model's; a run with another is then refused.")
    ] = None,
    vocab: Annotated[
        int | None,
        typer.Option(help="The model's number of logits, if config and tokenizer do not say it."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="At which they were captured.")] = 1.0,
    config: Annotated[
        Path | None,
        typer.Option(help="DistillKit's compression_config.yaml, if it is not beside the files."),
    ] = None,
    align: Annotated[
        str,
        typer.Option(
            help="Of axolotl's columns, which do not say it. next: row p is the distribution of "
            "token p + 1, as axolotl has it now; same: of token p, as it had it before June 2025."
        ),
    ] = "next",
    shard_mib: ShardMiB = 128.0,
) -> None:
    """Make a cache of log-probabilities that another tool captured.

    sadkern cache import data/*.parquet --format distillkit --teacher Qwen/Qwen3-8B --output cache/

    What is there already is not read again. Rows that are malformed are named and left out.
    """
    from sadkern.teacher.script import bring as run

    with told():
        run(
            files, output, format=format, teacher=teacher, revision=revision, tokenizer=tokenizer,
            vocab=vocab, temperature=temperature, config=config, align=align, shard_mib=shard_mib,
        )  # fmt: skip
