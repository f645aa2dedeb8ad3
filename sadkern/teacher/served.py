"""A teacher behind HTTP: vLLM, SGLang, or any server that gives a prompt's log-probabilities."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import torch
from torch import Tensor

from sadkern.sides import TopK
from sadkern.teacher.source import Example, trajectories
from sadkern.teacher.wire import WIRES, Entries, WireError, message_of, read

logger = logging.getLogger(__name__)
LONGEST_PAUSE = 30.0
# The most that is read of an answer: for each entry asked for (an id, a number, the token's text in
# escapes) and beside them (a list of models, a proxy's page).
ENTRY_BYTES, SLACK_BYTES = 1024, 16 << 20


class ServerError(RuntimeError):
    """A server does not give what it is asked; the message names it and says what it said."""


class ServedTeacher:
    """Asks a server for the likely tokens of a batch's supervised rows.

    Sequences go as token ids, several in one request, several requests at a time. What may pass (no
    connection, a time-out, a hang-up, status 429 or 5xx, half an answer) is tried again, after a
    pause that doubles; what does not (another status, an answer of another form, of another number
    of tokens or far longer than what was asked for) is told at once. Servers give log-probabilities
    at temperature 1 alone.

    Keep what it says with `CachedTeacher(path, ServedTeacher(..))`: it is asked of it once.

    Args:
        url: the server's, such as http://localhost:8000.
        kind: vllm, sglang, or openai: any `/v1/completions` that knows `echo` and `logprobs`.
        k: likely tokens of a row, beside the actual one (vLLM: `--max-logprobs` limits it).
        tokenizer: the model's; kind openai names tokens by their text where it cannot by id.
        model: its name; None takes the first that the server says it has.
        revision: whatever tells its weights from others' of that name.
        batch_size: sequences a request. concurrency: requests at a time.
        timeout: seconds until an answer is complete. tries: of each request. pause: seconds before
            the second.
        api_key: sent as a bearer token.
    """

    def __init__(
        self,
        url: str,
        *,
        kind: str = "vllm",
        k: int = 64,
        tokenizer: Any = None,
        model: str | None = None,
        revision: str | None = None,
        batch_size: int = 4,
        concurrency: int = 8,
        timeout: float = 300.0,
        tries: int = 6,
        pause: float = 0.5,
        api_key: str | None = None,
    ):
        if kind not in WIRES:
            raise ValueError(f"kind={kind!r}: expected one of {', '.join(WIRES)}")
        for name, value in {"k": k, "batch_size": batch_size, "concurrency": concurrency,
                            "tries": tries}.items():  # fmt: skip
            if value < 1:
                raise ValueError(f"{name}={value}: expected a positive number")
        self.url, self.wire, self.k = url.rstrip("/"), WIRES[kind], k
        self.tokenizer, self.revision = tokenizer, revision
        self.batch_size, self.concurrency, self.tries = batch_size, concurrency, tries
        self.timeout, self.pause = timeout, pause
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._model = model
        self._texts: dict[str, int] | None = None

    @property
    def model(self) -> str:
        """The name of what is served. ServerError: the server does not say."""
        if self._model is None:
            said = self._run(self._one("GET", self.wire.models))
            try:
                self._model = str(said["data"][0]["id"])
            except (KeyError, IndexError, TypeError):
                raise ServerError(
                    f"{self.url}{self.wire.models} does not say what it serves: expected model=.."
                ) from None
        return self._model

    def facts(self) -> dict[str, Any]:
        """Of the `Identity` of what it says. Its vocabulary is taken to be the tokenizer's, to
        which models often add a few that fill it up."""
        tokens = max(self.tokenizer.get_vocab().values()) + 1 if self.tokenizer else 1 << 17
        return {
            "teacher": self.model, "revision": self.revision, "vocab": -(-tokens // 1024) * 1024
        }  # fmt: skip

    def expect(self, examples: Sequence[Example], *, tokenizer: Any, temperature: float) -> None:
        """ValueError: another temperature than 1."""
        if temperature != 1:
            raise ValueError(
                f"temperature={temperature}, but a served teacher gives log-probabilities at 1 "
                "alone, and the tail's at another are not known: expected temperature=1"
            )

    def __call__(self, rows: Tensor, **inputs: Tensor) -> TopK:
        """See `TeacherSource`. ServerError: it does not answer, or not what was asked."""
        asked = list(trajectories(rows, **inputs))
        said = self._run(self._all([one.input_ids.tolist() for one in asked], self.model))
        entries = [of[p] for one, of in zip(asked, said, strict=True) for p in one.positions]
        found = _topk(entries, self.k + 1)
        return TopK(*(x.to(rows.device) for x in found))

    async def _all(self, prompts: list[list[int]], model: str) -> list[list[Entries]]:
        room = asyncio.Semaphore(self.concurrency)
        size = self.batch_size
        async with self._client() as client:

            async def some(part: list[list[int]]) -> list[list[Entries]]:
                async with room:
                    body = self.wire.ask(part, self.k, model)
                    entries = sum(map(len, part)) * (self.k + 1)
                    answer = await self._tried(client, "POST", self.wire.path, body, entries)
                try:
                    return read(self.wire, answer, part, self._id_of)
                except WireError as error:
                    raise ServerError(f"{self.url}{self.wire.path}: {error}") from error

            parts = [prompts[begin : begin + size] for begin in range(0, len(prompts), size)]
            return [one for found in await asyncio.gather(*map(some, parts)) for one in found]

    async def _one(self, method: str, path: str) -> Any:
        async with self._client() as client:
            return await self._tried(client, method, path, None)

    def _client(self) -> httpx2.AsyncClient:
        limits = httpx2.Limits(max_connections=self.concurrency)
        return httpx2.AsyncClient(timeout=self.timeout, limits=limits, headers=self._headers)

    async def _tried(
        self,
        client: httpx2.AsyncClient,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        entries: int = 0,
    ) -> Any:
        """The answer's JSON, after as many tries as it takes. `entries`: that it is to have."""
        where, wrong = self.url + path, ""
        most = SLACK_BYTES + entries * ENTRY_BYTES
        for attempt in range(self.tries):
            if attempt:
                # Not all at once, where many were refused at once.
                pause = min(self.pause * 2 ** (attempt - 1), LONGEST_PAUSE)
                logger.warning("%s: %s; try %d of %d", where, wrong, attempt + 1, self.tries)
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            try:
                asked = _answer(client, method, where, body, most)
                status, content = await asyncio.wait_for(asked, self.timeout)
            except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
                raise ServerError(
                    f"{where} is no address: {error}; expected http://host:port or the like"
                ) from error
            except (httpx2.RequestError, asyncio.TimeoutError) as error:
                wrong = f"{type(error).__name__} {error}".strip()
                continue
            try:
                said = json.loads(content) if content else None
            except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
                wrong = f"status {status} and no whole JSON: {error}"
            else:
                if status == 200:
                    return said
                wrong = f"status {status}, {message_of(said)}"
            if status not in (200, 429) and status < 500:
                raise ServerError(f"{where}: {wrong}")
        raise ServerError(f"{where} failed {self.tries} times, last by: {wrong}")

    def _run(self, work: Any) -> Any:
        # A thread of its own: the caller's may run a loop already, as a notebook's does.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(asyncio.run, work).result()

    def _id_of(self, text: str) -> int | None:
        """The token that a server calls `text`; None: no one token has that name."""
        if text.startswith("token_id:"):
            return int(text.removeprefix("token_id:"))
        if self._texts is None:
            if self.tokenizer is None:
                raise WireError(f"it names tokens by text, such as {text!r}: expected tokenizer=..")
            counted: dict[str, list[int]] = {}
            for i in self.tokenizer.get_vocab().values():
                counted.setdefault(self.tokenizer.decode([i]), []).append(i)
            self._texts = {name: ids[0] for name, ids in counted.items() if len(ids) == 1}
        return self._texts.get(text)


async def _answer(
    client: httpx2.AsyncClient, method: str, where: str, body: dict[str, Any] | None, most: int
) -> tuple[int, bytes]:
    """Status and content. ServerError: it is longer than `most` bytes."""
    content = bytearray()
    async with client.stream(method, where, json=body) as answer:
        async for part in answer.aiter_bytes():
            content += part
            if len(content) > most:
                raise ServerError(
                    f"{where}: its answer is longer than {most:,} bytes, which is more than what "
                    "was asked for can take: expected a server of the kind that is named"
                )
    return answer.status_code, bytes(content)


def _topk(rows: list[Entries], width: int) -> tuple[Tensor, Tensor]:
    """ids and logprobs `[M, width]`, the likeliest first; M may be 0."""
    ids, logprobs = [], []
    for row in rows:
        best = sorted(row.items(), key=lambda pair: (-pair[1], pair[0]))[:width]
        lacking = width - len(best)
        ids.append([i for i, _ in best] + [-1] * lacking)
        logprobs.append([x for _, x in best] + [float("-inf")] * lacking)
    shape = len(rows), width
    return (
        torch.tensor(ids, dtype=torch.int32).view(shape),
        torch.tensor(logprobs, dtype=torch.float32).view(shape),
    )
