"""Games of our own for ALFWorld: by their text, and, where its engine is there, played."""

from __future__ import annotations

import re
from collections import Counter
from importlib.util import find_spec

import pytest

from sadkern.evaluate.environments import alfworld
from sadkern.evaluate.environments.alfworld_games import HOMES, KNOWN_AS, SORTS, THINGS, game
from sadkern.evaluate.play import play
from sadkern.evaluate.scripted import drawn
from sadkern.evaluate.tasks import checked, tasks_of

engine = pytest.mark.skipif(find_spec("alfworld") is None, reason="alfworld is not installed")
GAMES = [game(3, index) for index in range(240)]


def facts(made):
    """{predicate: [arguments]} of the beginning."""
    found: dict[str, list[list[str]]] = {}
    begin = made["pddl_problem"].split("(:init")[1].split("(:goal")[0]
    for name, arguments in re.findall(r"\((\w+) ([^()]*)\)", begin):
        found.setdefault(name, []).append(arguments.split())
    return found


def test_games_are_drawn_from_their_seed():
    assert [game(3, index) for index in range(240)] == GAMES
    assert len({made["id"] for made in GAMES}) == 240
    assert len({made["pddl_problem"] for made in GAMES}) == 240
    assert game(4, 0)["pddl_problem"] != GAMES[0]["pddl_problem"]
    assert Counter(made["task_type"] for made in GAMES) == dict.fromkeys(SORTS, 40)
    assert all(set(things.split()) <= set(HOMES) for things in THINGS.values())


@pytest.mark.parametrize("kind", SORTS)
def test_what_a_task_needs_is_in_its_room(kind):
    for made in GAMES:
        if made["task_type"] != kind:
            continue
        wanted, target = (made["pddl_params"][f"{x}_target"] for x in ("object", "parent"))
        assert wanted.lower() in made["goal"].rstrip(".").split()
        found = facts(made)
        type_of = {o: t.removesuffix("Type") for o, t in found["objectType"]}
        kind_of = {r: t.removesuffix("Type") for r, t in found["receptacleType"]}
        at = dict(found["inReceptacle"])
        assert set(at) == set(type_of)
        # Not done at the beginning, and there are as many as are needed.
        mine = [kind_of[at[o]] for o, t in type_of.items() if t == wanted]
        assert target not in mine
        assert len(mine) >= (2 if kind == "pick_two_obj_and_place" else 1)
        can = {(r.removesuffix("Type"), o.removesuffix("Type")) for r, o in found["canContain"]}
        assert all(home in HOMES[thing].split() for home, thing in can)
        if target:
            assert target.lower() in made["goal"].rstrip(".").split()
            assert (target, wanted) in can
            assert target in kind_of.values()
        else:
            (lamp,) = (o for o, t in type_of.items() if t == "DeskLamp")
            assert found["toggleable"] == [[lamp]]
        for name, able in (("clean", "SinkBasin"), ("heat", "Microwave"), ("cool", "Fridge")):
            if name in kind:
                assert able in kind_of.values()
                assert wanted in KNOWN_AS[f"{name}able"]
                assert [f"{wanted}_bar_1"] in found[f"{name}able"]
        # A place a receptacle, and all but the lamp can be taken.
        places = [place for _, place in found["receptacleAtLocation"]]
        assert len(set(places)) == len(places) == len(kind_of)
        assert len(found["pickupable"]) == len(at) - (not target)


@engine
def test_every_game_can_be_won_and_seldom_by_chance():
    chosen = [game(5, index) for index in range(18)]
    assert [checked(made) for made in chosen] == chosen
    won = 0
    for made in chosen:
        env = alfworld.ALFWorld(made)
        first = env.reset()
        seen = [first, env.admissible]
        env.step(env.admissible[0])
        assert [env.reset(), env.admissible] == seen
        won += play(env, drawn(env, 1), max_turns=20).success
        env.close()
    assert won <= 1


@engine
def test_one_that_cannot_be_won_is_named():
    made = game(5, 0)
    thing = made["pddl_params"]["object_target"]
    kept = [
        line
        for line in made["pddl_problem"].splitlines()
        if not re.search(rf"\((pickupable) {thing}_bar", line)
    ]
    with pytest.raises(ValueError, match=re.escape(made["id"]) + " cannot be won: "):
        checked({**made, "pddl_problem": "\n".join(kept)})


@engine
def test_tasks_without_games_are_made():
    tasks = tasks_of("alfworld", None, 2, 7)
    assert [task.name for task in tasks] == [game(7, index)["id"] for index in range(2)]
    env = tasks[0].make()
    opening = env.reset()
    here = alfworld.ALFWorld(game(7, 0))
    assert opening == here.reset()
    action = next(one for one in here.admissible if one.startswith("go to"))
    assert env.step(action) == here.step(action)
    env.close()
