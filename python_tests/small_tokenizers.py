"""Tokenizers made for tests, and what holds of any: its tokens give the spans back."""

from __future__ import annotations

import json
from functools import cache
from itertools import accumulate, groupby

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import trainers as trainers_of
from transcripts import labelled
from transformers import PreTrainedTokenizerFast

from sadkern.spans import align


def token_kinds(aligned):
    """Back from rows to tokens: row p speaks of token p + 1, and of the first token none does."""
    return [0, *aligned.span_ids[:-1]][: len(aligned.input_ids)]


class Pieces:
    """A fast tokenizer whose tokens are stated: their texts, in order, or their offsets."""

    is_fast = True

    def __init__(self, *pieces, eos=None, offsets=None):
        ends = list(accumulate(map(len, pieces)))
        self.offsets = offsets or list(zip([0, *ends], ends, strict=False))
        self.pieces, self.eos_token_id = pieces, eos

    def __call__(self, text, **_):
        assert not self.pieces or "".join(self.pieces) == text
        return {"input_ids": list(range(len(self.offsets))), "offset_mapping": self.offsets}


CORPUS = [
    "Thought: I need to search the film and find its director. Action: search[film]",
    "Reasoning: find the fridge. Action: go to fridge 1. Observation: it is closed. Answer: 42",
]


@cache
def byte_level(trim_offsets=False):
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers_of.BpeTrainer(
        vocab_size=400,
        initial_alphabet=alphabet,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")


@cache
def metaspace(ends_itself=False):
    """As LLaMA's: blanks as U+2581, one put in front, bytes for what the vocabulary lacks."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers_of.BpeTrainer(vocab_size=150, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += sorted(model["vocab"], key=model["vocab"].get)
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge) for merge in model["merges"]]
    inner = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if ends_itself else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


TOKENIZERS = [byte_level, metaspace]


def assert_round_trip(tokenizer, found):
    """Tokens of a span decode to the span; they hold all of its characters, else white space."""
    aligned = align(found, tokenizer)
    kinds = token_kinds(aligned)
    runs = groupby(zip(kinds, aligned.input_ids, strict=True), key=lambda pair: pair[0])
    decoded = [
        (kind, tokenizer.decode([token for _, token in run], skip_special_tokens=True).strip())
        for kind, run in runs
        if kind
    ]
    assert decoded == labelled(found)
    offsets = tokenizer(found.text, return_offsets_mapping=True)["offset_mapping"]
    held = {
        (place, kind)
        for kind, (start, end) in zip(kinds, offsets, strict=False)
        for place in range(start, end)
        if kind
    }
    wanted = {(place, span.kind) for span in found.spans for place in range(span.start, span.end)}
    assert wanted <= held
    assert all(found.text[place].isspace() for place, _ in held - wanted)
    assert (aligned.straddled, aligned.uncovered) == (0, 0)
    assert len(aligned.span_ids) == len(aligned.input_ids)
