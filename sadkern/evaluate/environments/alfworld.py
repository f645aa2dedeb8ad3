"""ALFWorld's own engine, in text: `pip install 'sadkern[alfworld]'`.

A game is a record with "id", "goal" and "pddl_problem", as `games` reads them or `alfworld_games`
makes them. The engine's logic and grammar are those of the alfworld package.
"""

from __future__ import annotations

import json
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from sadkern.evaluate.environments import Outcome, records

NOTHING = "Nothing happens."
# Version 0.4 of the engine words three things otherwise than the one that trajectories were
# published of.
RECORDED_WORDS = {
    '"move {o} to {r}"': '"put {o} in/on {r}"',
    "You move the {o.name} to the {r.name}.": "You put the {o.name} in/on the {r.name}.",
    "You arrive at {r.name}.": "You arrive at {lend.name}.",
}


class ALFWorld:
    """`recorded_words`: says "put mug 1 in/on desk 1" as published trajectories do, rather than
    "move mug 1 to desk 1". ImportError: alfworld is not installed. ValueError: no game."""

    name = "alfworld"

    def __init__(self, game: dict[str, Any], *, recorded_words: bool = True):
        self.game = _checked(game)
        self.task, goal, problem = game["id"], game["goal"], game["pddl_problem"]
        domain, grammar = _logic()
        if recorded_words:
            for said, recorded in RECORDED_WORDS.items():
                grammar = grammar.replace(said, recorded)
        self._folder = Path(tempfile.mkdtemp(prefix="alfworld-"))
        written = {
            "pddl_domain": domain,
            "grammar": grammar.replace("UNKNOWN GOAL.", goal),
            "pddl_problem": problem,
            "solvable": True,
        }
        self._file = self._folder / "game.tw-pddl"
        self._file.write_text(json.dumps(written))
        self._engine: Any = None
        self.state: Any = None

    def reset(self) -> str:
        if self._engine is None:
            self._engine = _start(self._file)
        self.state = self._engine.reset()
        # Without the engine's welcome.
        return "\n".join(self.state["feedback"].strip().split("\n\n")[1:])

    def step(self, action: str) -> Outcome:
        self.state, _, _ = self._engine.step(action)
        seen, won = self.state["feedback"].strip(), bool(self.state["won"])
        return Outcome(seen, float(won), done=won, success=won, invalid=seen == NOTHING)

    @property
    def admissible(self) -> list[str]:
        """Actions that would do something now."""
        return list(self.state["admissible_commands"])

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def games(path: Path | str) -> Iterator[dict[str, Any]]:
    """Of a JSON-lines file, gzipped or not. ValueError: a line that is none."""
    return records(path, _checked)


def _checked(game: Any) -> dict[str, Any]:
    if not isinstance(game, dict) or not {"id", "goal", "pddl_problem"} <= set(game):
        said = sorted(game) if isinstance(game, dict) else type(game).__name__
        raise ValueError(f"no ALFWorld game ({said}): expected id, goal and pddl_problem")
    return game


def _package() -> Any:
    try:
        import alfworld
        import textworld  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"ALFWorld needs its engine ({error}): expected `pip install 'sadkern[alfworld]'`"
        ) from None
    return alfworld


def _logic() -> tuple[str, str]:
    folder = Path(_package().__file__).parent / "data"
    return (folder / "alfred.pddl").read_text(), (folder / "alfred.twl2").read_text()


GAMES_KEPT = 128  # translations of the last games, about 9 MB each


@cache
def _quicken() -> None:
    """Has the engine do once what it repeats with the same result: parse the few sentences of its
    grammar for each command that could be given, copy for each what no sentence changes, and
    translate a game, four times where one does since nothing here asks its planner."""
    import fast_downward
    from textworld.envs.pddl import textgen
    from textworld.logic import Rule

    parse, translate = textgen._parse_and_convert, fast_downward.pddl2sas

    @cache
    def parsed(text: str, rule_name: str) -> bytes:
        return pickle.dumps(parse(text, rule_name=rule_name))

    @lru_cache(GAMES_KEPT)
    def translated(domain: str, problem: str) -> Any:
        return translate(domain, problem)

    def copied(context: dict[str, Any]) -> dict[str, Any]:
        # Things are added to these two and none is changed.
        return {**context, **{key: dict(context[key]) for key in ("variables", "mapping")}}

    textgen.copy_context = copied
    # What is made of a sentence is changed by its use.
    textgen._parse_and_convert = lambda text, rule_name, **_: pickle.loads(parsed(text, rule_name))
    Rule.parse_conjunctive_query = cache(Rule.parse_conjunctive_query)
    fast_downward.pddl2sas = lambda domain, problem, **_: translated(domain, problem)


def _start(file: Path) -> Any:
    import textworld
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler

    _quicken()
    infos = textworld.EnvInfos(won=True, admissible_commands=True, facts=True)
    return textworld.start(str(file), infos, wrappers=[AlfredDemangler()])
