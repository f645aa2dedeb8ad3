"""`sadkern eval` and `sadkern generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sadkern.cli.app import GOES_ON, app, told

Model = Annotated[str, typer.Option(help="The agent: a folder or a hub's name.")]
Env = Annotated[str, typer.Option(help="alfworld, hotpotqa or webshop.")]
Output = Annotated[Path, typer.Option(help="A folder; a run that was interrupted there goes on.")]
Games = Annotated[
    Path | None, typer.Option(help="ALFWorld's games or HotPotQA's questions, JSON Lines or .gz.")
]
Count = Annotated[
    int | None, typer.Option(min=1, help="How many tasks, from the first; all if not given.")
]
Prompt = Annotated[
    str | None,
    typer.Option(
        help="A file's text before every transcript, or 'react': an instruction and an example "
        "that are shipped, for a model that was not trained on such."
    ),
]
Together = Annotated[int, typer.Option(min=1, help="Episodes that go on at a time.")]
Turns = Annotated[int, typer.Option(min=1, help="Turns of an episode, at most.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Tokens of a thought or action, at most.")]
Seed = Annotated[int, typer.Option(help="Seed of what is drawn: WebShop's goals, and tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0: each time the most likely token.")]
TopP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Share of the probability that is drawn from.")
]


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
    teacher_model: Annotated[
        str | None,
        typer.Option(help="The teacher itself: the KL of each kind of span to it is measured."),
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
    with told(GOES_ON):
        from sadkern.evaluate import script

        theirs = script.teacher_of(teacher or [])
        agent, played = _played(
            model, env, output, games, episodes, prompt, batch_size, max_turns, seed, samples=1,
            teacher_model=teacher_model, max_new_tokens=max_new_tokens, temperature=temperature,
            top_p=top_p,
        )  # fmt: skip
        script.report(played, theirs, agent, output, teacher_model)


@app.command()
def generate(
    model: Model,
    env: Env,
    output: Output,
    games: Games = None,
    episodes: Count = None,
    samples: Annotated[int, typer.Option(min=1, help="Attempts at each task.")] = 4,
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
    with told(GOES_ON):
        from sadkern.evaluate import script

        _, played = _played(
            model, env, output, games, episodes, prompt, batch_size, max_turns, seed,
            samples=samples, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
        )  # fmt: skip
        kept = script.keep_successful(played, output)
        typer.echo(f"{kept} of {len(played)} succeeded and are in {output / script.KEPT}")
        if not kept:
            typer.echo(
                "nothing to train on: try --prompt react, more --samples or a higher --temperature"
            )


def _played(
    model: str, env: str, output: Path, games: Path | None, count: int | None, prompt: str | None,
    batch_size: int, max_turns: int, seed: int, *, samples: int, teacher_model: str | None = None,
    **drawing: Any,
) -> tuple[Any, Any]:  # fmt: skip
    from sadkern.evaluate import script
    from sadkern.evaluate.tasks import tasks_of

    tasks = tasks_of(env, games, count, seed)
    asked = {"model": model, "prompt": prompt, "max_turns": max_turns, "seed": seed, **drawing}
    script.same_run(output, asked)
    agent = script.load_agent(model, script.prompt_of(prompt, env), seed, **drawing)
    if teacher_model is not None:
        script.check_teacher(teacher_model, agent.tokenizer)
    limits = {"samples": samples, "batch_size": batch_size, "max_turns": max_turns}
    return agent, script.run(agent, tasks, output, **limits)
