"""A served teacher says what the model says, in each server's words, and faults are told."""

from __future__ import annotations

import json
import math
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import RECORDS, small_model, small_tokenizer

from sadkern import span_kl, topk_logprobs
from sadkern.data import SpanCollator, prepare
from sadkern.store import Store
from sadkern.teacher import CachedTeacher, OnlineTeacher, ServedTeacher, ServerError
from sadkern.teacher import served as teacher_served
from sadkern.teacher.wire import WIRES, WireError, read

K = 20
KINDS = ("vllm", "sglang", "openai")
TOKENIZER = small_tokenizer()
MODEL = small_model(1, scale=3.0).eval()


def likely(prompt, k):
    """Of each token but the first: its log-probability, and the k likeliest in its place."""
    with torch.no_grad():
        logprobs = MODEL(torch.tensor([prompt])).logits[0, :-1].double().log_softmax(-1)
    top = logprobs.topk(k)
    own = logprobs.gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
    pairs = zip(top.values.tolist(), top.indices.tolist(), strict=True)
    return own, [list(zip(*pair, strict=True)) for pair in pairs]


def vllm(request):
    """The actual token first, whatever its rank; -inf as a number."""
    choices = []
    for index, prompt in enumerate(request["prompt"]):
        entries = [None]
        own, tops = likely(prompt, request["prompt_logprobs"])
        for token, logprob, top in zip(prompt[1:], own, tops, strict=True):
            entry = {str(token): {"logprob": logprob, "rank": 7, "decoded_token": "?"}}
            for rank, (value, i) in enumerate(top, 1):
                entry[str(i)] = {"logprob": value, "rank": rank, "decoded_token": "?"}
            entries.append(entry)
        choices.append({"index": index, "text": "?", "logprobs": None, "prompt_token_ids": prompt,
                        "prompt_logprobs": entries})  # fmt: skip
    count = sum(map(len, request["prompt"]))
    return {"choices": choices[::-1], "usage": {"prompt_tokens": count}}


def sglang(request):
    """Exactly k, the actual token apart from them, its last id clipped to 0."""
    answers = []
    for prompt in request["input_ids"]:
        own, tops = likely(prompt, request["top_logprobs_num"])
        ids = [*prompt[1:-1], 0]
        meta = {
            "prompt_tokens": len(prompt),
            "input_token_logprobs": [[None, prompt[0], None]]
            + [[value, i, None] for value, i in zip(own, ids, strict=True)],
            "input_top_logprobs": [None] + [[[v, i, None] for v, i in top] for top in tops],
        }
        answers.append({"text": "", "output_ids": [0], "meta_info": meta})
    return answers


def openai(request):
    """Echoed, with the token that was made after the prompt."""
    choices = []
    for index, prompt in enumerate(request["prompt"]):
        own, tops = likely(prompt, request["logprobs"])
        named = [{f"token_id:{i}": v for v, i in top} for top in tops]
        logprobs = {"token_logprobs": [None, *own, -0.5], "top_logprobs": [None, *named, {}]}
        choices.append({"index": index, "text": "?", "logprobs": logprobs})
    return {"choices": choices, "usage": {"prompt_tokens": sum(map(len, request["prompt"]))}}


ANSWERS = {"vllm": vllm, "sglang": sglang, "openai": openai}


class Server(ThreadingHTTPServer):
    """Answers as the kind that is asked for does; `faults` are had first, one a request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.asked, self.now, self.most = [], 0, 0, 0
        self.change = lambda answer: answer
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, body, status=200):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.answer({"object": "list", "data": [{"id": "tiny", "max_model_len": 256}]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked += 1
        self.server.now += 1
        self.server.most = max(self.server.most, self.server.now)
        try:
            fault = self.server.faults.pop(0) if self.server.faults else None
            kind = "sglang" if "input_ids" in request else "vllm"
            answer = ANSWERS["openai" if "echo" in request else kind](request)
            if fault is None:
                self.answer(self.server.change(answer))
            elif fault == "hang-up":
                self.connection.close()
            elif fault == "half":
                self.answer(json.dumps(answer).encode()[:-9])
            elif fault == "slow":
                time.sleep(1.5)
            elif fault == "endless":
                self.send_response(200)
                self.end_headers()
                with suppress(OSError):  # nobody listens any more
                    while self.wfile.write(b" " * 65536):
                        pass
            else:
                self.answer(*fault)
        finally:
            self.server.now -= 1


@pytest.fixture
def server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def batch():
    made = SpanCollator(0)(prepare(RECORDS, TOKENIZER))
    return made["rows"], {name: made[name] for name in ("input_ids", "attention_mask")}


def served(server, kind, **settings):
    settings = {"k": K, "tokenizer": TOKENIZER, "pause": 0.01, "timeout": 60.0, **settings}
    return ServedTeacher(server.url, kind=kind, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_the_models_whichever_server_says_it(server, batch, kind):
    rows, inputs = batch
    found = served(server, kind)(rows, **inputs)
    expected = topk_logprobs(OnlineTeacher(MODEL)(rows, **inputs), K)
    assert torch.equal(found.ids[:, :K], expected.ids)
    torch.testing.assert_close(found.logprobs[:, :K], expected.logprobs, rtol=0, atol=3e-6)
    # The actual token is there too, where it is none of the K.
    labels = inputs["input_ids"].flatten()[rows + 1]
    assert (found.ids == labels[:, None]).any(-1).all()
    assert (found.ids[:, K] == -1).sum() == (expected.ids == labels[:, None]).any(-1).sum()
    student = torch.randn(len(rows), MODEL.config.vocab_size)
    ones = torch.ones(len(rows), dtype=torch.int64)
    assert (span_kl(student, found, ones).per_token
            >= span_kl(student, expected, ones).per_token - 1e-5).all()  # fmt: skip


def test_a_batch_without_rows_asks_for_nothing(server, batch):
    """As a rank has it whose last batch of an evaluation is only filled up."""
    rows, inputs = batch
    found = served(server, "vllm")(rows[:0], **inputs)
    assert found.ids.shape == found.logprobs.shape == (0, K + 1)
    assert server.asked == 0
    kinds = torch.ones(0, dtype=torch.int64)
    assert span_kl(torch.randn(0, MODEL.config.vocab_size), found, kinds).loss.item() == 0


def test_tokens_named_by_text_are_those_that_one_token_has(server, batch):
    rows, inputs = batch
    texts = {}
    for i in TOKENIZER.get_vocab().values():
        texts.setdefault(TOKENIZER.decode([i]), []).append(i)

    def by_text(answer):
        for choice in answer["choices"]:
            choice["logprobs"]["top_logprobs"] = [
                top and {TOKENIZER.decode([int(name[9:])]): x for name, x in top.items()}
                for top in choice["logprobs"]["top_logprobs"]
            ]
        return answer

    server.change = by_text
    found = served(server, "openai")(rows, **inputs)
    whole = OnlineTeacher(MODEL)(rows, **inputs)
    logprobs = (whole.hidden @ whole.weight.T).log_softmax(-1)
    there = found.ids >= 0
    expected = logprobs.gather(-1, found.ids.clamp(min=0).long())
    torch.testing.assert_close(found.logprobs[there], expected[there], rtol=0, atol=3e-6)
    alone = {ids[0] for ids in texts.values() if len(ids) == 1}
    labels = inputs["input_ids"].flatten()[rows + 1]
    known = torch.tensor([[int(i) in alone for i in row] for row in found.ids])
    assert (known | ~there | (found.ids == labels[:, None])).all()
    with pytest.raises(ServerError, match=r"names tokens by text.*expected tokenizer="):
        served(server, "openai", tokenizer=None)(rows, **inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "fault", [({"error": {"message": "x"}}, 500), ({}, 503), (b"<html>", 502), ({}, 429),
              (b"\xff{}", 200), "hang-up", "half", "slow"], ids=str,
)  # fmt: skip
def test_what_may_pass_is_tried_again(server, batch, kind, fault):
    rows, inputs = batch
    server.faults = [fault, fault]
    teacher = served(server, kind, batch_size=8, timeout=1.0 if fault == "slow" else 60.0)
    found = teacher(rows, **inputs)
    assert server.asked == 3
    expected = topk_logprobs(OnlineTeacher(MODEL)(rows, **inputs), K)
    assert torch.equal(found.ids[:, :K], expected.ids)
    server.faults = [fault] * 9
    with pytest.raises(ServerError, match="failed 2 times, last by: "):
        served(server, kind, tries=2, timeout=1.0, batch_size=8)(rows, **inputs)


@pytest.mark.parametrize("status", [302, 400, 404])
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"error": {"message": "greater than max allowed: 20", "code": 400}}, "max allowed: 20"),
        ({"error": "unknown field `bar`"}, "unknown field `bar`"),
        ({"object": "error", "message": "too long", "code": 400}, "too long"),
        (b"<html>no</html>", "and no whole JSON"),
    ],
)
def test_what_does_not_pass_is_told_at_once(server, batch, body, said, status):
    rows, inputs = batch
    server.faults = [(body, status)]
    with pytest.raises(ServerError, match=rf"status {status}.*{said}"):
        served(server, "vllm", batch_size=8)(rows, **inputs)
    assert server.asked == 1


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://localhost", "http://localhost:port"])
def test_what_is_no_address_is_told_at_once(batch, caplog, url):
    rows, inputs = batch
    with pytest.raises(ServerError, match=rf"{url}/v1/completions is no address: .*expected http"):
        ServedTeacher(url, model="tiny", pause=0.01)(rows, **inputs)
    assert "try 2" not in caplog.text


def test_an_answer_without_end_is_not_read_to_it(server, batch, monkeypatch):
    rows, inputs = batch
    monkeypatch.setattr(teacher_served, "SLACK_BYTES", 1 << 20)
    server.faults = ["endless"]
    with pytest.raises(ServerError, match=r"longer than [\d,]+ bytes.*: expected"):
        served(server, "vllm", batch_size=8)(rows, **inputs)
    assert server.asked == 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_may_be_as_long_as_what_was_asked_for_can_be(server, batch, kind):
    """Far longer than the tests' own: of tokens that are long, each written in escapes."""
    rows, inputs = batch
    whole = served(server, kind)(rows, **inputs)

    def longer(answer):
        text = json.dumps(answer)
        return text.replace(", ", "," + " " * 100).encode()

    server.change = longer
    assert torch.equal(served(server, kind)(rows, **inputs).ids, whole.ids)


def shorter(answer):
    one = answer[0]["meta_info"] if isinstance(answer, list) else answer["choices"][0]
    for holder in (one, one.get("logprobs") or {}):
        for name in ("prompt_logprobs", "input_token_logprobs", "token_logprobs"):
            if name in holder:
                holder[name] = holder[name][: len(holder[name]) // 2]
    return answer


def other_count(answer):
    holder = answer[0]["meta_info"] if isinstance(answer, list) else answer["usage"]
    holder["prompt_tokens"] -= 1
    return answer


def logits(answer):
    text = json.dumps(answer).replace('"logprob": -', '"logprob": ').replace("[-", "[")
    return json.loads(text.replace('": -', '": '))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shorter, "expected .*, one a token"),
        (other_count, "it read .* tokens of the .* sent"),
        (logits, "add up to .*, expected at most 1"),
        (lambda answer: {"choices": 7}, "it (gave|answered)"),
        (lambda answer: None, "of another form|it answered"),
    ],
)
def test_an_answer_of_another_form_is_told(server, batch, kind, change, said):
    rows, inputs = batch
    server.change = change
    with pytest.raises(ServerError, match=said):
        served(server, kind, batch_size=8)(rows, **inputs)


def places(value, path=()):
    """The path to each value in a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def put(value, path, other):
    if not path:
        return other
    value = value.copy()
    value[path[0]] = put(value[path[0]], path[1:], other)
    return value


PROMPTS = [[3, 9, 4], [7, 5]]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3),
    max_leaves=6,
)
WHOLE = {
    "vllm": vllm({"prompt": PROMPTS, "prompt_logprobs": 3}),
    "sglang": sglang({"input_ids": PROMPTS, "top_logprobs_num": 3}),
    "openai": openai({"prompt": PROMPTS, "logprobs": 3}),
}
PLACES = {kind: list(places(answer)) for kind, answer in WHOLE.items()}


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_whatever_is_answered_is_distributions_or_told(kind, data):
    """One value of an answer, or all of it, is any other."""
    path = data.draw(st.sampled_from(PLACES[kind]))
    answer = put(WHOLE[kind], path, data.draw(ANYTHING))
    try:
        found = read(WIRES[kind], answer, PROMPTS, lambda text: len(text) % 9)
    except WireError:
        return
    assert [len(rows) for rows in found] == [len(prompt) - 1 for prompt in PROMPTS]
    for prompt, rows in zip(PROMPTS, found, strict=True):
        for actual, row in zip(prompt[1:], rows, strict=True):
            assert actual in row
            assert all(type(i) is int and i >= 0 and type(x) is float for i, x in row.items())
            assert sum(math.exp(x) for x in row.values()) <= 1.01


def test_an_answer_without_the_token_itself_is_told():
    """vLLM gives the actual token beside the likely ones; without it, it is no row of ours."""
    answer = vllm({"prompt": PROMPTS, "prompt_logprobs": 3})
    del answer["choices"][0]["prompt_logprobs"][1]["5"]
    with pytest.raises(WireError, match="entries of token 1 lack that token itself, 5"):
        read(WIRES["vllm"], answer, PROMPTS, lambda text: None)


def test_a_dead_server_is_named(server, batch):
    rows, inputs = batch
    teacher = served(server, "vllm", model="tiny", tries=3)
    server.shutdown()
    server.server_close()
    with pytest.raises(ServerError, match=f"{server.url}/v1/completions failed 3 times"):
        teacher(rows, **inputs)


def test_requests_are_bounded(server, batch):
    rows, inputs = batch
    served(server, "vllm", batch_size=1, concurrency=2)(rows, **inputs)
    assert server.asked == 8
    assert server.most <= 2


def test_another_temperature_is_refused(server):
    teacher = served(server, "vllm")
    teacher.expect([], tokenizer=TOKENIZER, temperature=1.0)
    with pytest.raises(ValueError, match=r"temperature=2\.0.*expected temperature=1"):
        teacher.expect([], tokenizer=TOKENIZER, temperature=2.0)


def test_what_was_said_is_asked_once_and_outlives_the_server(tmp_path, server, batch):
    rows, inputs = batch
    through = CachedTeacher(tmp_path, served(server, "vllm"), tokenizer=TOKENIZER, k=K)
    first = through(rows, **inputs)
    asked = server.asked
    second = through(rows, **inputs)
    through.close()
    third = CachedTeacher(tmp_path)(rows, **inputs)
    assert server.asked == asked
    for other in (second, third):
        assert torch.equal(other.ids, first.ids)
        assert torch.equal(other.logprobs, first.logprobs)
    identity = Store.open(tmp_path).identity
    assert identity.teacher == "tiny"
    assert identity.k == K
