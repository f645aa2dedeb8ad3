"""A language model as an agent: it writes a thought and an action after a transcript."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from sadkern.evaluate.episode import Episode
from sadkern.evaluate.play import Move
from sadkern.evaluate.transcripts import Transcripts


@dataclass
class LanguageAgent:
    """`Thought:` and `Action:` are written for it, and each ends with its line, or after
    `max_new_tokens`.

    `prefix`: what every transcript begins with, such as examples. `temperature` 0: the most
    likely token each time. A transcript longer than the model can see loses its beginning, of
    which the prefix and the task stay as long as half of that room holds them.
    """

    model: Any
    tokenizer: Any
    prefix: str = ""
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        self._padding = next((token for token in (pad, eos) if token is not None), 0)
        self._ids = tokens_of(self.tokenizer)
        self._transcripts = Transcripts(self.model, self._padding)

    def __call__(self, episodes: Sequence[Episode]) -> list[Move]:
        """The next move of each, all at once."""
        thoughts = self._write(episodes, ["Thought:"] * len(episodes))
        begun = [f"Thought: {thought}\nAction:" for thought in thoughts]
        actions = self._write(episodes, begun)
        return [
            Move(thought, action, len(self._ids(thought)), len(self._ids(action)))
            for thought, action in zip(thoughts, actions, strict=True)
        ]

    def _write(self, episodes: Sequence[Episode], begun: Sequence[str]) -> list[str]:
        """The rest of the line that a turn has come to."""
        batch = self._transcripts.batch(
            {one.key: self._prompt(one, text) for one, text in zip(episodes, begun, strict=True)}
        )
        length = batch.input_ids.shape[1]
        drawing = {"temperature": self.temperature, "top_p": self.top_p} if self.temperature else {}
        made = self.model.generate(
            **self._transcripts.inputs(batch), max_new_tokens=self.max_new_tokens,
            do_sample=bool(self.temperature), **drawing, pad_token_id=self._padding,
            stopping_criteria=StoppingCriteriaList([_LineWritten(self.tokenizer, length)]),
        )  # fmt: skip
        self._transcripts.keep(batch, made)
        return [line(text) for text in _texts(self.tokenizer, made[:, length:])]

    def _prompt(self, episode: Episode, begun: str) -> list[int]:
        head = self._ids(f"{self.prefix}{episode.opening}\n")
        turns = episode.text[len(episode.opening) + 1 :] if episode.turns else ""
        rest = self._ids(turns + begun)
        config = self.model.config
        room = getattr(config, "max_position_embeddings", None) or 1 << 30
        room -= self.max_new_tokens
        if len(head) + len(rest) > room:
            head = head[-max(room // 2, room - len(rest)) :]
            rest = rest[-(room - len(head)) :]
        return head + rest


def tokens_of(tokenizer: Any) -> Callable[[str], list[int]]:
    """A text's tokens, and no other, as metrics take them too."""
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def line(text: str) -> str:
    """The first that is not blank; what a model goes on to invent after it does not count.

    >>> line(" go to desk 1\\nObservation: On the desk 1, ..")
    'go to desk 1'
    """
    return text.strip().split("\n", 1)[0].strip()


class _LineWritten(StoppingCriteria):
    """Ends a row with its line."""

    def __init__(self, tokenizer: Any, prompt: int):
        self.tokenizer, self.prompt = tokenizer, prompt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = _texts(self.tokenizer, input_ids[:, self.prompt :])
        return torch.tensor(["\n" in text.lstrip() for text in texts], device=input_ids.device)


def _texts(tokenizer: Any, ids: Tensor) -> list[str]:
    return tokenizer.batch_decode(ids, skip_special_tokens=True)
