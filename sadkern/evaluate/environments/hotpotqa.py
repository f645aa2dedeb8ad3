"""HotPotQA over given paragraphs: search[title], lookup[word], finish[answer].

As in ReAct's Wikipedia environment, of which the encyclopedia is a question's own ten paragraphs.
Answers are scored as HotPotQA does: normalised, by exact match and by F1 over words.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sadkern.evaluate.environments import Outcome, records

ACTION = re.compile(r"\s*(search|lookup|finish)\s*\[(.*)\]\s*", re.IGNORECASE | re.DOTALL)
SIMILAR = 5  # titles that are named where none is exact


class HotPotQA:
    """`question`: a record with "id", "question", "answer" and "context": [[title, [sentence]]], or
    {"title": [..], "sentences": [[..]]}."""

    name = "hotpotqa"

    def __init__(self, question: Mapping[str, Any]):
        try:
            self.task = str(question["id"])
            self.question, self.answer = str(question["question"]), str(question["answer"])
            context: Any = question["context"]
            if isinstance(context, Mapping):  # as the hub has it
                context = zip(context["title"], context["sentences"], strict=True)
            self.paragraphs = {title: [s.strip() for s in said] for title, said in context}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"no HotPotQA question ({error!r}): expected id, question, answer and context, "
                "[[title, [sentence]]] or {title: [..], sentences: [[..]]}"
            ) from None
        self.record = question
        self._titles = {normalised(title): title for title in self.paragraphs}
        self._page: list[str] = []
        self._word = ""
        self._found: Iterator[str] = iter(())

    def reset(self) -> str:
        self._page, self._word = [], ""
        return f"Question: {self.question}"

    def step(self, action: str) -> Outcome:
        read = ACTION.fullmatch(action)
        if read is None:
            return Outcome(
                "Invalid action. Valid actions are Search[title], Lookup[word] and Finish[answer].",
                invalid=True,
            )
        kind, argument = read[1].lower(), read[2].strip()
        if kind == "search":
            return Outcome(self._search(argument))
        if kind == "lookup":
            return Outcome(self._lookup(argument))
        exact, f1 = exact_match(argument, self.answer), f1_score(argument, self.answer)
        said = f"Answer is {'CORRECT' if exact else 'INCORRECT'}"
        facts = {"answer": argument, "f1": f1}
        return Outcome(said, float(exact), done=True, success=exact, facts=facts)

    @property
    def admissible(self) -> list[str]:
        """Searches for each title, look-ups of each word of the open page, and its own answers."""
        words = sorted({word for said in self._page for word in normalised(said).split()})
        kinds = ("Lookup", "Finish")
        return [f"Search[{title}]" for title in self.paragraphs] + [
            f"{kind}[{word}]" for kind in kinds for word in words
        ]

    def close(self) -> None:
        pass

    def _search(self, title: str) -> str:
        exact = self._titles.get(normalised(title))
        self._word = ""
        if exact is None:
            near = difflib.get_close_matches(normalised(title), self._titles, SIMILAR, cutoff=0.0)
            return f"Could not find [{title}]. Similar: {[self._titles[name] for name in near]}."
        self._page = self.paragraphs[exact]
        return " ".join(self._page)

    def _lookup(self, word: str) -> str:
        if not self._page:
            return "No page is open to look a word up in. Search[title] opens one."
        if word.lower() != self._word:
            self._word = word.lower()
            hits = [said for said in self._page if self._word in said.lower()]
            self._found = iter([f"(Result {i} / {len(hits)}) {x}" for i, x in enumerate(hits, 1)])
        return next(self._found, "No more results.")


def normalised(text: str) -> str:
    """As HotPotQA compares answers: lower case, no punctuation, no articles, single blanks."""
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def exact_match(answer: str, gold: str) -> bool:
    """Whether both are the same when normalised."""
    return normalised(answer) == normalised(gold)


def f1_score(answer: str, gold: str) -> float:
    """Over words of both, normalised; yes, no and noanswer match themselves alone.

    >>> f1_score("the city of Bath, Maine", "Bath, Maine")
    0.6666666666666666
    """
    ours, theirs = normalised(answer), normalised(gold)
    whole = {"yes", "no", "noanswer"}
    if ours != theirs and (ours in whole or theirs in whole):
        return 0.0
    words, expected = ours.split(), theirs.split()
    same = (Counter(words) & Counter(expected)).total()
    return 2 * same / (len(words) + len(expected)) if same else 0.0


def questions(path: Path | str) -> Iterator[HotPotQA]:
    """Of a JSON-lines file, gzipped or not. ValueError: a line that is no question."""
    return records(path, HotPotQA)
