"""A language model as an agent: it writes a thought and an action after a transcript."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from sadkern.evaluate.episode import Episode
from sadkern.evaluate.play import Move
from sadkern.evaluate.transcripts import Transcripts

THOUGHT = re.compile(r"\s*(Thought|Reasoning)[ \d]*:", re.IGNORECASE)
ACTION = re.compile(r"(?:^|\n)\s*Action[ \d]*:", re.IGNORECASE)


@dataclass
class LanguageAgent:
    """`prefix`: what every transcript begins with, such as examples. `temperature` 0: the most
    likely token each time. A transcript longer than the model can see loses its beginning, of
    which the prefix and the task stay as long as half of that room holds them."""

    model: Any
    tokenizer: Any
    prefix: str = ""
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        self._padding = next((token for token in (pad, eos) if token is not None), 0)
        self._transcripts = Transcripts(self.model, self._padding)

    def __call__(self, episodes: Sequence[Episode]) -> list[Move]:
        """The next move of each, all at once."""
        batch = self._transcripts.batch({one.key: self._prompt(one) for one in episodes})
        length = batch.input_ids.shape[1]
        drawing = {"temperature": self.temperature, "top_p": self.top_p} if self.temperature else {}
        made = self.model.generate(
            **self._transcripts.inputs(batch), max_new_tokens=self.max_new_tokens,
            do_sample=bool(self.temperature), **drawing, pad_token_id=self._padding,
            stopping_criteria=StoppingCriteriaList([_ActionWritten(self.tokenizer, length)]),
        )  # fmt: skip
        self._transcripts.keep(batch, made)
        texts = self.tokenizer.batch_decode(made[:, length:], skip_special_tokens=True)
        return [self._move(text) for text in texts]

    def _prompt(self, episode: Episode) -> list[int]:
        head = self._ids(f"{self.prefix}{episode.opening}\n")
        rest = self._ids(episode.text[len(episode.opening) + 1 :] if episode.turns else "")
        config = self.model.config
        room = getattr(config, "max_position_embeddings", None) or 1 << 30
        room -= self.max_new_tokens
        if len(head) + len(rest) > room:
            head = head[-max(room // 2, room - len(rest)) :]
            rest = rest[-(room - len(head)) :]
        return head + rest

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _move(self, text: str) -> Move:
        thought, action = written(text)
        return Move(thought, action, len(self._ids(thought)), len(self._ids(action)))


def written(text: str) -> tuple[str, str]:
    """Thought and action of what a model wrote, "" where there is none; what it goes on to invent,
    an observation or a further turn, does not count."""
    thought, *rest = ACTION.split(text.split("\nObservation", 1)[0])
    action = rest[0].strip() if rest else ""
    return THOUGHT.sub("", thought, count=1).strip(), action.split("\n", 1)[0].strip()


class _ActionWritten(StoppingCriteria):
    """Ends a row with the line of its action."""

    def __init__(self, tokenizer: Any, prompt: int):
        self.tokenizer, self.prompt = tokenizer, prompt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt :], skip_special_tokens=True)
        ended = [
            "\nObservation" in x or "\n" in "".join(ACTION.split(x)[1:]).lstrip() for x in texts
        ]
        return torch.tensor(ended, device=input_ids.device)
