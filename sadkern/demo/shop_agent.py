"""An agent for the shop: it is given nothing but text, and reasons before every action."""

from __future__ import annotations

import random
import re

from .agent import Speaker, Steps
from .shop import Goal

SEARCH = (
    "I need {what}. I search the shop for a {sort} first.",
    "The goal asks for {what}. To begin, I search for a {sort}.",
    "I am looking for {what}, so I type {sort} into the search box.",
)
OPEN = (
    "{code} is a {sort} for {price} dollars, within {limit}. I open it to see the options.",
    "I see a {sort}, {code}, for {price} dollars. That is at most {limit}, so I open it.",
)
OPEN_OTHER = (
    "The other {sort} is {code} for {price} dollars, within {limit}. I open it instead.",
    "{code} is also a {sort}, and {price} dollars is at most {limit}. I look at it next.",
)
TURN = (
    "No result here is a {sort}. I go to the next page.",
    "I do not see a {sort} on this page, so I click next.",
)
TURN_DEAR = (
    "{code} is a {sort}, but {price} dollars is more than {limit}. I go to the next page.",
    "The {sort} {code} costs {price} dollars, above {limit}, so I click next.",
)
TURN_SEEN = (
    "I have seen {code}, and no other {sort} here will do. I go to the next page.",
    "{code} was not right and this page has no other {sort} for me. I click next.",
)
LACKS_COLOUR = (
    "{code} comes in {colours}, but the goal asks for {colour}. I go back.",
    "There is no {colour} among the colours {colours}. I go back to the results.",
)
LACKS_SIZE = (
    "{code} comes in {colour}, but not in size {size}. I go back to the results.",
    "The sizes are {sizes}, but the goal asks for {size}. I go back.",
)
COLOUR = (
    "{code} comes in {colour}, as the goal asks. I choose {colour}.",
    "The page offers {colour}, which is the colour I need, so I click it.",
)
SIZE = (
    "The colour is set to {colour}. The goal also asks for size {size}, so I choose it.",
    "Next comes the size. The page has {size}, which I need, so I click it.",
)
BUY = (
    "I have set {code} to {choice} for {price} dollars. This meets the goal, so I buy it.",
    "{code} in {choice} is what the goal asks for, and {price} is at most {limit}. I buy it now.",
)


class _Agent(Speaker):
    """Opens the results that fit by title and price, page by page, until the options fit too."""

    def __init__(self, task: str, rng: random.Random) -> None:
        super().__init__(rng)
        self.goal = Goal.parse(task)
        self.sort = f"{self.goal.material} {self.goal.kind}"
        self.rejected: list[str] = []

    def say(self, options: tuple[str, ...], **words: str) -> str:
        goal = self.goal
        common = {"sort": self.sort, "limit": str(goal.limit), "colour": goal.colour}
        return super().say(options, **common, size=goal.size, **words)

    def play(self) -> Steps:
        what = str(self.goal).removeprefix("buy ").partition(" for at most")[0]
        page = yield self.say(SEARCH, what=what), f"search[{self.sort}]"
        while True:
            matching = re.findall(rf"\[(B\d+)\] {self.sort}, (\d+) dollars", page)
            fitting = [
                {"code": code, "price": price}
                for code, price in matching
                if code not in self.rejected and int(price) <= self.goal.limit
            ]
            if not fitting:
                page = yield self.turn(matching), "click[next]"
                continue
            words = fitting[0]
            opening = OPEN_OTHER if self.rejected else OPEN
            shown = yield self.say(opening, **words), f"click[{words['code']}]"
            if lack := self.lack(shown, words["code"]):
                self.rejected.append(words["code"])
                page = yield lack, "click[back]"
                continue
            yield from self.buy(**words)
            return

    def turn(self, matching: list[tuple[str, str]]) -> str:
        """Why to leave a page of results."""
        if not matching:
            return self.say(TURN)
        for code, price in matching:
            if code not in self.rejected:
                return self.say(TURN_DEAR, code=code, price=price)
        return self.say(TURN_SEEN, code=matching[0][0])

    def lack(self, shown: str, code: str) -> str:
        """What an item's page does not offer, if anything."""
        colours = re.findall(r"\[(\w+)\]", shown.partition("Colour: ")[2].partition(".")[0])
        sizes = re.findall(r"\[(\w+)\]", shown.partition("Size: ")[2].partition(".")[0])
        if self.goal.colour not in colours:
            return self.say(LACKS_COLOUR, code=code, colours=" and ".join(colours))
        if self.goal.size and self.goal.size not in sizes:
            return self.say(LACKS_SIZE, code=code, sizes=" and ".join(sizes))
        return ""

    def buy(self, code: str, price: str) -> Steps:
        goal = self.goal
        yield self.say(COLOUR, code=code), f"click[{goal.colour}]"
        if goal.size:
            yield self.say(SIZE), f"click[{goal.size}]"
        choice = goal.colour + (f" and {goal.size}" if goal.size else "")
        yield self.say(BUY, code=code, price=price, choice=choice), "click[buy now]"


def agent(task: str, observation: str, rng: random.Random) -> Steps:
    """Play a goal: yields a thought and an action, and is sent the observation that follows."""
    return _Agent(task, rng).play()
