"""WebShop: pages as recorded, its reward, and agents that know all or nothing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from sadkern.evaluate.environments import webshop
from sadkern.evaluate.environments.webshop import Goal, Product, Shop, WebShop
from sadkern.evaluate.environments.webshop_goods import catalogue, goals
from sadkern.evaluate.play import play
from sadkern.evaluate.scripted import drawn, perfect

DATA = Path(__file__).parents[2] / "shared" / "data"
MUG = Product(
    "B1", "Red Mug", 8.5, {"color": ("red", "dark red"), "size": ("s", "l")}, ("hand made",),
    "mug", "A mug, dishwasher safe.", ("keeps tea hot",),
)  # fmt: skip
OTHERS = [Product("B2", "Blue Cup", 3.0, {"color": ("blue",)}, ("hand made",), "cup"),
          Product("B3", "Green Cup", 30.0), Product("B4", "Tall Glass", 4.0),
          Product("B5", "Red Glass", 5.0)]  # fmt: skip
SHOP = Shop([MUG, *OTHERS])
GOAL = Goal("g", "i need a red mug", "B1", ("hand made", "dishwasher safe"),
            {"color": "dark red", "size": "l"}, 10.0)  # fmt: skip


def test_an_episode():
    env = WebShop(SHOP, GOAL)
    assert env.reset() == "\nWebshop \nInstruction:  \ni need a red mug \n[Search] \n"
    assert env.step("click[B1]").observation == "Invalid action!"
    page = env.step("search[red mug]").observation
    assert page.startswith("\n[Back to Search] \nPage 1 (Total results: 5) \n[Next >] \n[B1] \n")
    assert "Red Mug \n$8.5 \n" in page
    assert page.count("$") == 3
    assert "[< Prev]" in env.step("click[Next >]").observation
    assert env.step("click[Next >]").invalid  # the last page
    assert env.step("click[< Prev]").observation == page
    item = env.step("click[b1]").observation
    assert item == (
        "\n[Back to Search] \n[< Prev] \ncolor [red][dark red]\nsize [s][l]\nRed Mug \n"
        "Price: $8.5 \nRating: N.A. \n[Description] \n[Features] \n[Reviews] \n[Buy Now] \n"
    )
    assert "dishwasher safe" in env.step("click[Description]").observation
    assert env.step("click[Buy Now]").invalid  # not on that page
    assert env.step("click[< Prev]").observation == item
    assert env.step("click[red]").observation == "You have clicked red."
    assert env.step("click[Dark Red]").observation == "You have clicked Dark Red."
    assert env.step("think[size is next]").observation == "OK."
    assert env.step("click[l]").observation == "You have clicked l."
    end = env.step("click[Buy Now]")
    assert end.observation == "Your score (min 0.0, max 1.0): 1.0"
    assert (end.done, end.success, end.reward) == (True, True, 1.0)
    assert end.facts == {"bought": "B1", "options": {"color": "dark red", "size": "l"}}


@pytest.mark.parametrize(
    ("product", "chosen", "score"),
    [
        (MUG, {"color": "dark red", "size": "l"}, 1.0),
        (MUG, {"color": "red", "size": "l"}, 4 / 5),
        (MUG, {}, 3 / 5),
        (replace(MUG, price=10.5), {"color": "dark red"}, 3 / 5),
        (replace(MUG, attributes=(), description=""), {}, 1 / 5),
        # Another kind: half of the title, a fifteenth of it, nothing of it.
        (replace(MUG, kind="", name="Red Thing"), {}, 3 / 5),
        (OTHERS[0], {}, 0.0),
    ],
)
def test_the_reward_is_what_was_asked_for(product, chosen, score):
    assert webshop.reward(product, chosen, GOAL, SHOP) == pytest.approx(score)


def test_a_kind_that_is_nearly_another():
    long = replace(MUG, asin="L", name=" ".join(f"w{i}" for i in range(20)), kind="x")
    shop = Shop([long, *OTHERS])
    goal = Goal("g", "", "L")
    for count, score in ((0, 0.0), (1, 0.1), (2, 0.5), (4, 0.5), (5, 1.0)):
        name = " ".join(f"w{i}" for i in range(count)) or "none"
        assert webshop.reward(Product("P", name, 1.0), {}, goal, shop) == pytest.approx(score)


def test_an_agent_that_knows_always_succeeds_and_one_that_draws_seldom():
    products = catalogue(300, seed=1)
    shop, won = Shop(products), 0
    for goal in goals(products, 50, seed=2):
        env = WebShop(shop, goal)
        episode = play(env, perfect(env))
        assert episode.success, episode.text
        won += play(env, drawn(env, 0), max_turns=15).success
    assert won < 5
    assert catalogue(300, seed=1) == products != catalogue(300, seed=2)


def test_what_is_wrong_is_named():
    with pytest.raises(ValueError, match=r"goal g: expected a product of the shop, got 'B9'"):
        WebShop(SHOP, replace(GOAL, asin="B9"))


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")
def test_pages_read_as_those_of_recorded_episodes():
    lines = (DATA / "webshop_catalogue.jsonl").read_text().splitlines()
    records = {record["asin"]: record for record in map(json.loads, lines)}
    items = lists = 0
    for line in (DATA / "webshop.dev.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["format"] != "react-webshop":
            continue
        turns = re.split(r"\n\nAction: |^Action: ", record["text"])
        for turn in turns:
            action, _, seen = turn.partition("\nObservation: ")
            seen = seen.rstrip("\n") + "\n"
            clicked = re.fullmatch(r"click\[(B\w+)\]", action)
            if clicked and "[Buy Now]" in seen and records[clicked[1]].get("seen_page"):
                items += 1
                page = webshop.item_page(shown(records[clicked[1]]))
                # A notebook's warning follows one of them, a blank too many another.
                assert seen.startswith(page.rstrip()), action
            if action.startswith("search[") and "[Next >]" in seen:
                lists += 1
                found = re.findall(r"\n\[(B\w+)\] \n(.*) \n(\$.*) (?=\n)", seen)
                products = [shown({"asin": a, "name": n, "price": p}) for a, n, p in found]
                assert webshop.results_page(products, 0, 50) == seen
    assert items > 200
    assert lists > 200


def shown(record):
    """With its price as it was written, which may be a range."""
    named = {name: record[name] for name in ("asin", "name", "options") if name in record}

    class Written(Product):
        pass

    product = Written(**named, price=0.0)
    object.__setattr__(product, "price", record["price"].removeprefix("$"))
    return product
