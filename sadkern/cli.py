"""The command `sadkern`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ImportError:  # pragma: no cover
    sys.exit("the command sadkern needs typer: expected `pip install 'sadkern[train]'`")

app = typer.Typer(
    help="Structured agent distillation: align a small agent to a large one, span by span.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
def train(context: typer.Context) -> None:
    """Distil a teacher into a student on a file of trajectories (`train --help` says how).

    sadkern train --model_name_or_path student/ --teacher_model_name_or_path teacher/
    --dataset_name trajectories.jsonl --output_dir runs/student
    """
    from sadkern.train.script import main as run

    run(context.args)


@app.command()
def demo(
    output_dir: Annotated[
        Path, typer.Option(help="Where models, figures and the picture go.")
    ] = Path("runs/demo"),
    seed: Annotated[
        int, typer.Option(help="Of initial weights and order; another, other numbers.")
    ] = 0,
) -> None:
    """Train a small teacher on shipped trajectories, distil a smaller student, print how it went.

    Everything is real and on this machine's CPU: under four minutes on two cores.
    """
    from sadkern.demo.run import main as run

    run(output_dir, seed)


@app.command()
def inspect(
    data: Annotated[
        list[Path], typer.Argument(help="Files of trajectories: JSON Lines or JSON, gzip or not.")
    ],
    profile: Annotated[
        str, typer.Option(help="How they are written: auto, a profile's name, or a .yaml file.")
    ] = "auto",
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Of the student: lengths are in its tokens, chats by its template."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a trajectory that are kept; what is cut is told.")
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Trajectories of each environment that are shown in colour.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Of which are shown.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object to standard output, no samples.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="A page with table, histograms and samples, to write.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="The histograms of span lengths, to write.")
    ] = None,
) -> None:
    """Show what in files of trajectories would be trained on: REASON in blue, ACT in red.

    Exit status: 1 where a line is no trajectory (it is named, and the rest goes on), else 0.

    sadkern inspect trajectories.jsonl --tokenizer student/ --max-length 512 --html report.html
    """
    from sadkern.inspect.script import main as run

    raise typer.Exit(
        run(
            data, profile, tokenizer, max_length, samples, seed,
            as_json=as_json, html=html, png=png,
        )
    )  # fmt: skip


cache = typer.Typer(
    help="""Keep a teacher's signal on disk, so that training needs no teacher.

    sadkern cache --model Qwen/Qwen3-8B --data trajectories.jsonl --k 64 --output cache/

    sadkern train --model_name_or_path Qwen/Qwen3-0.6B --teacher_cache cache/ ..

    Interrupted, the same command goes on where it was. Started several times, or by torchrun, the
    processes share the work. Trajectories that are there already are not computed again.""",
    invoke_without_command=True,
    no_args_is_help=True,
)
app.add_typer(cache, name="cache")
ShardMiB = Annotated[float, typer.Option(help="Size of a file, in MiB.")]
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
    k: Annotated[int, typer.Option(help="Tokens that are kept of a row (or drawn).")] = 64,
    mode: Annotated[
        str,
        typer.Option(
            help="topk; hidden (last hidden states and the head: exact, 2 D bytes a token); "
            "sampled (k draws: unbiased gradients)."
        ),
    ] = "topk",
    temperature: Annotated[float, typer.Option(help="At which the student is compared.")] = 1.0,
    tokenizer: Annotated[str | None, typer.Option(help="If not the model's own.")] = None,
    profile: Annotated[
        str, typer.Option(help="How trajectories are written: auto, a name or a .yaml file.")
    ] = "auto",
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a trajectory, as in training.")
    ] = 512,
    truncation: Annotated[str, typer.Option(help="As in training: right, left, drop, split.")] = (
        "right"
    ),
    supervise_markers: Annotated[
        bool, typer.Option("--supervise-markers", help="As in training.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Trajectories at a time.")] = 8,
    dtype: Annotated[str, typer.Option(help="Of its weights; auto: as they are saved.")] = "auto",
    device: Annotated[str, typer.Option(help="Where it runs: auto, cuda:1, cpu, ..")] = "auto",
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep its weights in the host's memory.")
    ] = False,
    quantization: Annotated[
        str | None, typer.Option(help="8bit or 4bit; what it costs in KL is measured.")
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="A server's address in place of a model loaded here.")
    ] = None,
    server_kind: Annotated[str, typer.Option(help="vllm, sglang or openai.")] = "vllm",
    concurrency: Annotated[int, typer.Option(help="Requests to the server at a time.")] = 8,
    timeout: Annotated[float, typer.Option(help="Seconds until it has answered.")] = 300.0,
    shard_mib: ShardMiB = 128.0,
) -> None:
    if context.invoked_subcommand:
        return
    if not data or output is None:
        raise typer.BadParameter("expected --data FILE and --output DIR")
    from sadkern.teacher.script import write as run

    with _told():
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
    """Say what a cache holds: whose signal, of how much, in how many bytes."""
    from sadkern.teacher.script import info as run

    with _told():
        run(path, as_json)


@cache.command()
def verify(
    path: StorePath,
    drop: Annotated[
        bool, typer.Option("--drop", help="Set damaged files aside, so that they are made again.")
    ] = False,
) -> None:
    """Read every byte of a cache and name the files that are not as they were written.

    Exit status: 1 where there are any, else 0.
    """
    from sadkern.teacher.script import check as run

    with _told():
        status = run(path, drop)
    raise typer.Exit(status)


@cache.command()
def merge(
    sources: Annotated[list[Path], typer.Argument(help="Caches of the same signal.")],
    output: Annotated[Path, typer.Option(help="Where the cache of all is made.")],
    shard_mib: ShardMiB = 128.0,
) -> None:
    """Make one cache of several, each trajectory once, in files of even size."""
    from sadkern.teacher.script import join as run

    with _told():
        run(sources, output, shard_mib)


@cache.command("import")
def import_captures(
    files: Annotated[
        list[Path], typer.Argument(help="Parquet; of axolotl's columns JSON Lines too.")
    ],
    format: Annotated[str, typer.Option(help="Whose captures: distillkit or axolotl.")],
    output: Annotated[Path, typer.Option(help="Where the cache is made or added to.")],
    teacher: Annotated[str, typer.Option(help="The model that gave them, by name.")],
    revision: Annotated[str | None, typer.Option(help="Of the model.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Of the model; a run with another is then refused.")
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

    with _told():
        run(
            files, output, format=format, teacher=teacher, revision=revision, tokenizer=tokenizer,
            vocab=vocab, temperature=temperature, config=config, align=align, shard_mib=shard_mib,
        )  # fmt: skip


@app.command()
def plan(
    student: Annotated[
        str, typer.Option(help="A model of the paper, such as llama-7b, or a folder.")
    ] = "llama-7b",
    teacher: Annotated[str, typer.Option(help="Likewise.")] = "llama-13b",
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
    supervised: Annotated[float, typer.Option(help="Share of them that carries a loss.")] = 1.0,
    k: Annotated[int, typer.Option(help="Tokens of a cached or served teacher.")] = 64,
    rank: Annotated[int, typer.Option(help="Of adapters.")] = 16,
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
    with _told():
        setting = Setting(
            student=student, teacher=teacher, method=method, source=teacher_source,
            optimizer=optimizer, in_backward=in_backward, checkpointing=checkpointing, batch=batch,
            seq_len=seq_len, supervised=supervised, k=k, rank=rank, gpus=gpus, fsdp=fsdp,
        )  # fmt: skip
        run(setting, gpu, track=track, compare=compare, as_json=json)


Model = Annotated[str, typer.Option(help="The agent: a folder or a hub's name.")]
Env = Annotated[str, typer.Option(help="alfworld, hotpotqa or webshop.")]
Output = Annotated[Path, typer.Option(help="A folder; a run that was interrupted there goes on.")]
Games = Annotated[
    Path | None, typer.Option(help="ALFWorld's games or HotPotQA's questions, JSON Lines or .gz.")
]
Count = Annotated[int | None, typer.Option(help="Of tasks, the first ones; all if not given.")]
Prompt = Annotated[
    Path | None, typer.Option(help="A text before every transcript, such as examples.")
]
Together = Annotated[int, typer.Option(help="Episodes that go on at a time.")]
Turns = Annotated[int, typer.Option(help="Of an episode at most.")]
NewTokens = Annotated[int, typer.Option(help="Of a turn at most.")]
Seed = Annotated[int, typer.Option(help="Of what is drawn: WebShop's goals, and tokens.")]
Temperature = Annotated[float, typer.Option(help="0: each time the most likely token.")]
TopP = Annotated[float, typer.Option(help="Share of the probability that is drawn from.")]


@app.command("eval")
def evaluate(
    model: Model,
    env: Env,
    output: Output,
    games: Games = None,
    episodes: Count = None,
    teacher: Annotated[
        list[Path] | None,
        typer.Option(help="Logs of the teacher on these tasks: CoT match is measured to them."),
    ] = None,
    prompt: Prompt = None,
    batch_size: Together = 8,
    max_turns: Turns = 50,
    max_new_tokens: NewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
) -> None:
    """Let an agent play, and measure success, reasoning, steps and likeness to a teacher.

    sadkern eval --model runs/student --env alfworld --games games.jsonl.gz --output runs/played

    Writes episodes.jsonl (one episode a line), summary.json and summary.png.
    """
    with _told():
        from sadkern.evaluate import script

        theirs = script.teacher_of(teacher or [])
        agent, played = _played(
            model, env, output, games, episodes, prompt, batch_size, max_turns, seed, samples=1,
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
        )  # fmt: skip
        script.report(played, theirs, agent.tokenizer, output)


@app.command()
def generate(
    model: Model,
    env: Env,
    output: Output,
    games: Games = None,
    episodes: Count = None,
    samples: Annotated[int, typer.Option(help="Attempts at each task.")] = 4,
    prompt: Prompt = None,
    batch_size: Together = 8,
    max_turns: Turns = 50,
    max_new_tokens: NewTokens = 128,
    temperature: Temperature = 0.2,
    top_p: TopP = 1.0,
    seed: Seed = 0,
) -> None:
    """Collect a teacher's trajectories, and keep those that succeeded.

    sadkern generate --model TEACHER --env hotpotqa --games questions.jsonl.gz --output runs/teacher

    Writes episodes.jsonl, of all attempts, and trajectories.jsonl, which `sadkern train` takes.
    """
    with _told():
        from sadkern.evaluate import script

        _, played = _played(
            model, env, output, games, episodes, prompt, batch_size, max_turns, seed,
            samples=samples, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
        )  # fmt: skip
        kept = script.keep_successful(played, output)
        typer.echo(f"{kept} of {len(played)} succeeded and are in {output / script.KEPT}")


def _played(
    model: str, env: str, output: Path, games: Path | None, count: int | None, prompt: Path | None,
    batch_size: int, max_turns: int, seed: int, *, samples: int, **drawing: Any,
) -> tuple[Any, Any]:  # fmt: skip
    from sadkern.evaluate import script
    from sadkern.evaluate.tasks import tasks_of

    tasks = tasks_of(env, games, count, seed)
    agent = script.load_agent(model, prompt, seed, **drawing)
    limits = {"samples": samples, "batch_size": batch_size, "max_turns": max_turns}
    return agent, script.run(agent, tasks, output, **limits)


@contextmanager
def _told() -> Iterator[None]:
    """What is wrong with the input is said in a line, without a traceback."""
    try:
        yield
    except (ValueError, LookupError, OSError, RuntimeError, ImportError) as error:
        typer.echo(f"error: {error.args[0] if isinstance(error, KeyError) else error}", err=True)
        raise typer.Exit(2) from None


@app.command()
def info() -> None:
    """Say which kernels were built and which this machine uses."""
    from sadkern import __version__, build_info

    typer.echo(f"sadkern {__version__}")
    for key, value in build_info().items():
        typer.echo(f"  {key}: {', '.join(value) if isinstance(value, list) else value}")


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
