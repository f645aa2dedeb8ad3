"""What `sadkern eval` and `sadkern generate` do."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn, track
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from sadkern.evaluate.agent import LanguageAgent, tokens_of
from sadkern.evaluate.compare import kl_of_episode
from sadkern.evaluate.episode import Episode, Log, read
from sadkern.evaluate.metrics import Interval, summary
from sadkern.evaluate.play import Running, play_together
from sadkern.evaluate.tasks import Task
from sadkern.files import write_json, write_whole
from sadkern.teacher.named import model_named

REACT, SHIPPED = "react", Path(__file__).parent / "prompts"
LOG, SCORES, PLOT, KEPT = "episodes.jsonl", "summary.json", "summary.png", "trajectories.jsonl"
SETTINGS = "settings.json"


def prompt_of(prompt: str | None, env: str) -> str:
    """A file's text, or the one that is shipped for `env`, of the paper's instruction and an
    example. OSError: it cannot be read."""
    if prompt is None:
        return ""
    path = SHIPPED / f"{env}.txt" if prompt == REACT else Path(prompt)
    return path.read_text(encoding="utf-8")


def load_agent(model: str, prefix: str, seed: int, **options: Any) -> LanguageAgent:
    """A folder's or a hub's; `seed`: of the tokens that are drawn. OSError, ValueError: it cannot
    be loaded."""
    set_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model_named(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(model)
    return LanguageAgent(loaded.to(device).eval(), tokenizer, prefix, **options)


def check_teacher(model: str, tokenizer: Any) -> None:
    """Before anything is played. ValueError: it has other tokens than the agent; OSError: there is
    none."""
    AutoConfig.from_pretrained(model_named(model))
    if AutoTokenizer.from_pretrained(model).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{model} has other tokens than the agent: no KL between them")


def same_run(output: Path, settings: Mapping[str, Any]) -> None:
    """Keeps `settings` beside the log in `output`. ValueError: the log there is of others."""
    path = output / SETTINGS
    if path.exists():
        before = json.loads(path.read_text())
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{output} has episodes of another run: {name} is {before.get(name)!r} there "
                    f"and {value!r} here; expected another --output, or the same settings"
                )
    write_json(path, settings)


def run(
    agent: Any,
    tasks: Sequence[Task],
    output: Path,
    *,
    samples: int = 1,
    batch_size: int = 8,
    max_turns: int = 50,
    max_invalid: int | None = None,
) -> list[Episode]:
    """Plays what the log in `output` has not; all of its episodes of these tasks. BusyError:
    another run plays into it. ValueError: there is nothing to play."""
    if not tasks:
        raise ValueError("no task to play: expected games, and --episodes of at least 1")
    wanted = {
        (task.env, task.name, sample): task for task in tasks for sample in range(samples)
    }  # fmt: skip
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Log(output / LOG) as log, Progress(*columns, console=console) as progress:
        left = [key for key in wanted if key not in log]

        def running() -> Iterator[Running]:
            for key in left:
                env = wanted[key].make()
                yield Running(env, max_turns=max_turns, max_invalid=max_invalid, sample=key[-1])

        bar = progress.add_task("playing", total=len(wanted), completed=len(wanted) - len(left))
        played = [episode for episode in log.episodes if episode.key in wanted]
        won = sum(episode.success for episode in played)
        for episode in play_together(running(), agent, batch_size):
            log.append(episode)
            played.append(episode)
            won += episode.success
            progress.update(bar, advance=1, description=f"{won} of {len(played)} succeeded")
    return played


def report(
    episodes: Sequence[Episode],
    teacher: Sequence[Episode],
    agent: LanguageAgent,
    output: Path,
    teacher_model: str | None = None,
) -> None:
    """A table, and in `output` the same as JSON and as a picture. With a teacher's model, which
    `check_teacher` has let pass, also the agent's KL to it on what the agent did."""
    tokenizer = agent.tokenizer
    further = {}
    if teacher_model is not None:
        beside = load_agent(teacher_model, "", 0)
        console = Console(stderr=True)
        for one in track(episodes, "comparing with the teacher", console=console):
            further[one.key] = kl_of_episode(agent.model, beside.model, tokenizer, one)
    found = summary(episodes, teacher, tokens_of(tokenizer), further)
    scores = {
        env: {name: one._asdict() for name, one in rows.items()} for env, rows in found.items()
    }
    failures = Counter(episode.failure for episode in episodes if episode.failure)
    write_json(output / SCORES, {"scores": scores, "failures": failures})
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for env in found:
        table.add_column(env, justify="right")
    for name in dict.fromkeys(name for rows in found.values() for name in rows):
        table.add_row(name, *(_told(rows[name]) if name in rows else "" for rows in found.values()))
    console = Console()
    console.print(table)
    console.print("(mean, and a 95 % interval over episodes by bootstrap)", highlight=False)
    for failure, count in failures.most_common(10):
        console.print(f"  {count} ended by: {failure}", highlight=False, markup=False)
    if found:
        plot(found, output / PLOT)


def plot(found: dict[str, dict[str, Interval]], path: Path) -> None:
    """A panel a metric, a bar an environment, with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(next(iter(found.values())))
    figure, axes = pyplot.subplots(1, len(names), figsize=(2.4 * len(names), 2.6), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        rows = [of[name] for of in found.values()]
        values = [one.value for one in rows]
        errors = [[one.value - one.low for one in rows], [one.high - one.value for one in rows]]
        axis.bar(list(found), values, yerr=errors, capsize=3, color="#4878a8")
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def keep_successful(episodes: Sequence[Episode], output: Path) -> int:
    """Writes what succeeded as trajectories to learn from; how many."""
    kept = [episode for episode in episodes if episode.success]
    lines = [
        {"id": f"{one.env}:{one.task}:{one.sample}", "env": one.env, "text": one.text}
        for one in kept
    ]  # fmt: skip
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_whole(output / KEPT, text.encode())
    return len(kept)


def teacher_of(paths: Sequence[Path]) -> list[Episode]:
    """Of logs, or of the folders that they are in."""
    return list(read(path / LOG if path.is_dir() else path for path in paths))


def _told(one: Interval) -> str:
    return f"{one.value:.3g} ({one.low:.3g}-{one.high:.3g})" if one.episodes else "-"
