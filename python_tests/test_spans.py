"""sadkern.spans: what is supervised, to the character and to the token."""

import json
import re
import sys
from functools import cache
from itertools import accumulate, groupby, pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_profiles import CASES, chat, labelled
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import trainers as trainers_of
from transformers import PreTrainedTokenizerFast

from sadkern.spans import ACT, NAMED, REASON, Segmentation, Span, align, segment

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "hotpotqa.dev.jsonl"
R, A = REASON, ACT


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


@pytest.mark.parametrize("build", TOKENIZERS)
@pytest.mark.parametrize("record", [record for cases in CASES.values() for record, _ in cases])
def test_round_trip(build, record):
    assert_round_trip(build(), segment(record))


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


def test_example_of_appendix_d3():
    # The page shows it on one line; its patterns are anchored to line starts, so it has two.
    reasoning = "I should find the fridge. It\u2019s likely in the kitchen."
    found = segment(f"Reasoning: {reasoning}\nAction: goto kitchen")
    assert found.profile == "paper"
    assert labelled(found) == [(R, reasoning), (A, "goto kitchen")]
    words = re.findall(r" ?[^\s:]+|\s|:", found.text)
    aligned = align(found, Pieces(*words))
    marker, colon = [0], [0]
    reason, act = [R] * (len(reasoning.split()) + 1), [A] * 2  # + 1: the newline that ends it
    assert token_kinds(aligned) == marker + colon + reason + marker + colon + act


@pytest.mark.parametrize(
    ("pieces", "kinds"),
    [
        (["Action", ":", " go", "\n"], [0, 0, A, A, 0]),
        (["Action", ":", " go", "\n\n"], [0, 0, A, A, 0]),
        (["Action", ":", " go", "\n", "\n"], [0, 0, A, A, 0, 0]),
        (["Action", ":", " go", "\r", "\n"], [0, 0, A, A, A, 0]),
        (["Action", ":", " go", "  ", " \n", "ok"], [0, 0, A, A, A, 0, 0]),
        (["Action", ":", " go", "]\n", "\n"], [0, 0, A, A, 0, 0]),
        (["Action", ":", " go", "\nok"], [0, 0, A, 0, 0]),
        (["Action", ":", " go"], [0, 0, A, A]),
        (["Action", ":", " go", " "], [0, 0, A, A, A]),
        (["Thought", ":", " a", "\n", "Action", ":", "\n"], [0, 0, R, R, 0, 0, 0, 0]),
    ],
)
def test_stop_token(pieces, kinds):
    """The stop is the first token with a newline, or the EOS, here 99, where the text ends."""
    aligned = align(segment("".join(pieces)), Pieces(*pieces, eos=99))
    assert aligned.input_ids == [*range(len(pieces)), 99]
    assert token_kinds(aligned) == kinds
    assert aligned.span_ids == [*kinds[1:], 0]


def test_no_eos_means_no_stop_at_the_end():
    pieces = ["Action", ":", " go", " "]
    aligned = align(segment("".join(pieces)), Pieces(*pieces))
    assert (aligned.input_ids, token_kinds(aligned)) == ([0, 1, 2, 3], [0, 0, A, 0])
    # Nor is a last blank one that a tokenizer reports as empty: that is no special token.
    trimmed = Pieces(offsets=[(0, 6), (6, 7), (8, 10), (11, 11)])
    assert token_kinds(align(segment("Action: go "), trimmed)) == [0, 0, A, 0]


def test_eos_once():
    found = segment("Thought: find\nAction: go")
    without, itself = align(found, metaspace()), align(found, metaspace(ends_itself=True))
    assert without == itself
    assert itself.input_ids[0] == 1
    assert itself.input_ids.count(2) == 1
    assert (itself.input_ids[-1], itself.span_ids[-2:]) == (2, [A, 0])
    assert align(segment("Action: go\nOK."), metaspace()).span_ids[-2:] == [0, 0]
    assert align(segment(""), Pieces(eos=7)) == align(Segmentation("", [], None), Pieces(eos=7))
    assert (align(segment(""), Pieces(eos=7)).input_ids, align(segment(""), Pieces()).span_ids) == (
        [7],
        [],
    )


def test_straddling_and_uncovered_are_counted():
    pieces = ["Thought", ": I", " go\nAction: run", " on\nObservation"]
    aligned = align(segment("".join(pieces)), Pieces(*pieces))
    # The third token holds the end of the thought and the start of the action: the first has it.
    assert token_kinds(aligned) == [0, R, R, A]
    assert (aligned.straddled, aligned.uncovered) == (3, 0)
    dropping = Pieces(offsets=[(0, 7), (7, 8), (8, 10), (12, 14)])
    dropped = align(segment("Thought: I\u0001\u0002 go it"), dropping)
    assert (token_kinds(dropped), dropped.uncovered) == ([0, 0, R, R], 5)


def test_trimmed_offsets_change_nothing():
    """Byte-level tokenizers may report a blank as empty: inside a span it is supervised still."""
    text = "Thought: a  b   é \nAction: go   to \n"
    trimmed = align(segment(text), byte_level(trim_offsets=True))
    assert trimmed == align(segment(text), byte_level())
    assert 0 not in trimmed.span_ids[trimmed.span_ids.index(R) : trimmed.span_ids.index(A) - 4]


@pytest.mark.parametrize("build", TOKENIZERS)
def test_every_byte_of_a_character_is_supervised(build):
    tokenizer = build()
    aligned = align(segment("Action: 😀"), tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(aligned.input_ids)
    assert token_kinds(aligned)[-5:] == [A] * 5  # four bytes and the EOS
    assert len(set(tokens[-5:])) == 5


@pytest.mark.parametrize("build", TOKENIZERS)
def test_truncation_is_counted(build):
    found = segment(CASES["react-hotpotqa"][0][0])
    whole = align(found, build())
    assert whole.truncated == {R: 0, A: 0}
    for length in range(1, len(whole.input_ids) + 2):
        short = align(found, build(), max_length=length)
        assert short.input_ids == whole.input_ids[:length]
        assert short.span_ids[-1] == 0
        assert len(short.span_ids) == len(short.input_ids)
        for kind in (R, A):
            assert short.span_ids.count(kind) + short.truncated[kind] == whole.span_ids.count(kind)


def test_earlier_settings_of_a_tokenizer_cut_nothing():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=512)
    assert_round_trip(tokenizer, segment(CASES["react-hotpotqa"][0][0]))


def test_prompt_comes_first_and_is_unsupervised():
    shots = "Thought: an example\nAction: shown"
    record = {"text": "Thought: mine\nAction: go", "prompt": shots}
    found = segment(record)
    assert found.text == f"{shots}\n{record['text']}"
    assert labelled(found) == [(R, "mine"), (A, "go")]
    assert segment(record | {"prompt": f"{shots}\n"}).text == found.text
    assert segment({"text": f"\n{record['text']}", "prompt": shots}) == found
    assert segment({"text": "a", "prompt": None}).text == "a"
    # What the prompt holds has no vote on the profile either.
    assert segment({"text": "Reasoning: a\nAction: b", "prompt": shots * 3}).profile == "paper"


def test_nothing_found_is_said():
    for text in ("Hello.", "Observation: a"):
        found = segment(text)
        assert (found.spans, found.profile) == ([], None)
        assert found.warnings == [
            "no span found: no line begins with a supervised marker of any profile"
        ]
    for text in ("", " \r\n\r\n"):
        assert segment(text).warnings == ["no span found: there is no text"]
    named = segment("Reasoning: a", "react-hotpotqa")
    assert (named.spans, named.profile) == ([], "react-hotpotqa")
    assert "no line begins with a supervised marker of the profile react-hot" in named.warnings[0]
    empty = segment("Thought 1:\nAction 1: ")
    assert (empty.spans, empty.profile) == ([], "react-hotpotqa")
    assert "react-hotpotqa is without content" in empty.warnings[0]


@pytest.mark.parametrize(
    ("record", "profile", "message"),
    [
        ("a", "alfworld", "profile 'alfworld': expected auto, react-webshop, eto, paper"),
        ("a", None, "profile None: expected auto, react-webshop"),
        (b"a", "auto", "record is bytes: expected a string, a list of messages, or a mapping"),
        (["a"], "auto", r"messages\[0\] is str: expected a mapping"),
        ({"messages": 3}, "auto", 'has "messages" 3: expected a string under "text", or a list'),
        ({"messages": []}, "auto", r'record has "messages" \[\]: expected a string under "text"'),
        ({"text": 3}, "auto", 'record has "text" 3: expected a string'),
        ({"id": 3}, "auto", r"record has \['id'\]: expected a string"),
        ({"text": "a", "prompt": []}, "auto", 'record has "prompt" of list: expected a string'),
        ([{"content": "a"}], "auto", r"messages\[0\] has no role: expected one of assistant"),
        ([{"role": "user", "content": 3}], "auto", r"messages\[0\] has content of int: expected"),
        (
            [{"role": "assistant", "tool_calls": [{"id": 3}]}],
            "auto",
            r"messages\[0\] has tool call \{'id': 3\}: expected a function with a name",
        ),
    ],
)
def test_wrong_arguments_of_segment(record, profile, message):
    with pytest.raises(ValueError, match=message):
        segment(record, profile)


def test_wrong_arguments_of_align():
    class BertTokenizerOfOld:
        is_fast = False

    with pytest.raises(ValueError, match="BertTokenizerOfOld, which has no character offsets"):
        align(segment("Action: go"), BertTokenizerOfOld())
    with pytest.raises(ValueError, match="max_length 0: expected at least 1"):
        align(segment("Action: go"), byte_level(), max_length=0)
    with pytest.raises(ValueError, match="half a surrogate pair at character 8"):
        align(segment("Action: \ud83d"), byte_level())


# White space of every sort and all of Unicode, but no colon, so that no content begins a marker, no
# "<", which begins the names of special tokens, and no U+2581, which decoding turns into a blank.
content = st.lists(
    st.one_of(
        st.sampled_from(
            ["a", "b]", " ", "  ", "\t", "\x0b", "\u00a0", "\u3000", "é漢", "😀", "\u0301"]
        ),
        st.characters(exclude_characters=":<\n\r\u2581", exclude_categories=["Cs"]),
    ),
    max_size=8,
).map("".join)
breaks = st.sampled_from(["\n", "\r\n", "\n\n"])
MARKERS = {"Thought:": R, "Thought 3:": R, "Action:": A, "Action 3:": A, "Observation 3:": 0}
blocks = st.tuples(
    st.sampled_from(sorted(MARKERS)), st.lists(content, min_size=1, max_size=3), breaks
)


@given(content, st.lists(blocks, max_size=6))
@settings(max_examples=150, deadline=None)
def test_any_interleaving(head, transcript):
    text, expected = f"{head}\n", []
    for marker, lines, newline in transcript:
        text += marker + newline.join(lines) + newline
        kind = MARKERS[marker]
        own = newline.join(lines) if kind == R else lines[0]
        expected += [(kind, own.strip())] if kind and own.strip() else []
    found = segment(text, "react-hotpotqa")
    assert labelled(found) == expected
    assert bool(found.warnings) == (not expected)
    for build in TOKENIZERS:
        assert_round_trip(build(), found)


OTHER_MARKERS = [
    *(
        "Reasoning:",
        "Answer:",
        "Goal:",
        "Action: think[",
        "Action: reset",
        "> ",
        "> think:",
        " think:",
    ),
    *(
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "```\n",
        "\n```",
        "ACTION:",
    ),
    *(
        "<command>",
        "</command>",
        "DISCUSSION\n",
        "THOUGHT:",
        "Act:",
        "(Open file: a)",
        "<|im_end|>\n",
    ),
    *("<|im_start|>assistant\n", "<|im_start|>user\n", "Final Answer:", "Action Input:"),
]
soup = st.lists(
    st.one_of(
        st.sampled_from([*MARKERS, *OTHER_MARKERS, "\n", "\n", "\r\n", "\r", " ", ":"]),
        st.sampled_from(["\u2581", "<s>", "<0x0A>", "<|endoftext|>", "é漢", "\x85", "\u2028"]),
        st.text(max_size=5),
    ),
    max_size=20,
).map("".join)
profiles = st.sampled_from(["auto", *NAMED])


def check_any(record, profile, max_length):
    found = segment(record, profile)
    assert found.spans or found.warnings
    place = 0
    for (start, end, kind), stop in zip(found.spans, found.stops, strict=True):
        assert place <= start < end <= stop <= len(found.text) + 1
        assert found.text[start:end] == found.text[start:end].strip()
        assert kind in (R, A)
        place = end
    assert found.stops == sorted(found.stops)
    for tokenizer in (byte_level(), metaspace()):
        aligned = align(found, tokenizer, max_length)
        assert len(aligned.input_ids) == len(aligned.span_ids) <= max_length
        assert set(aligned.span_ids) <= {0, R, A}
    return found


@given(soup, profiles, st.integers(1, 40))
@settings(max_examples=300, deadline=None)
@example("\nAction:\nAction:a", "auto", 1)
def test_any_text(text, profile, max_length):
    found = check_any(text, profile, max_length)
    assert found.text == text
    if found.profile in ("paper", "react-hotpotqa"):
        for start, _, kind in found.spans:
            line = text.rfind("\n", 0, start) + 1
            marker = r"[ \t]*(Action( ?\d+)?|(Final )?Answer( ?\d+)?) ?:\s*$"
            turn = text.rfind("assistant\n", 0, start) == line - len("assistant\n")
            assert kind == R or turn or re.match(marker, text[line:start])


@given(st.lists(soup, min_size=1, max_size=5), profiles, st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_any_chat(contents, profile, max_length):
    record = chat("Begin.", *contents)
    found = check_any(record, profile, max_length)
    place = 0
    inside = []
    for message in record:  # in each of the model's turns, and in none of the user's
        written = message["content"] if message["content"].strip() else ""
        start = found.text.find(written, place)
        place = start + len(written)
        if message["role"] == "assistant":
            inside.append((start, place))
    thinks = any("</think>" in text for text in contents)  # which may be written otherwise
    for span in found.spans:
        assert thinks or any(a <= span.start and span.end <= b for a, b in inside)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Thought: " + "x " * 500_000, [(9, 1_000_008, R)]),
        ("Thought" + " " * 1_000_000, []),
        ("Action 1" + "1" * 1_000_000 + ": go", [(1_000_010, 1_000_012, A)]),
        (" \t" * 500_000 + "Action: go", [(1_000_008, 1_000_010, A)]),
        ("Thought: " + "\r\n \t" * 250_000 + "Action: go", [(1_000_017, 1_000_019, A)]),
    ],
    ids=["content", "blanks", "digits", "indent", "empty lines"],
)
def test_a_line_of_a_megabyte(text, expected):
    """With a scan that went back over the line, these would take hours."""
    assert segment(text).spans == [Span(*span) for span in expected]


@pytest.mark.parametrize(
    "unit",
    [
        *(
            "> ",
            ">",
            ">\n",
            "> \n\n ",
            "\n\n ",
            "<think>",
            "<tool_call>x",
            "</think>",
            "```\n",
            "[",
            "]",
        ),
        *(
            "Action: think[",
            "Action: ",
            "Thought 1 ",
            "Action 12 ",
            "Final ",
            "x \n\t",
            "<|im_start|>",
        ),
        *(
            "<|im_start|>assistant\n",
            "<function=a",
            "(Open file: ",
            "Action:\n",
            "\r",
            "é漢😀",
            "DISCUSSION ",
        ),
    ],
)
@pytest.mark.parametrize("name", NAMED)
def test_a_megabyte_of_anything_in_any_profile(name, unit):
    text = unit * (300_000 // len(unit))
    for record in (text, [{"role": "assistant", "content": text}]):
        found = segment(record, name)
        assert all(a.end <= b.start for a, b in pairwise(found.spans))


def test_work_grows_with_the_text():
    """Lines of sadkern.spans that run: ten times the steps, at most ten times the lines."""

    def lines_run(steps):
        count = 0

        def trace(frame, event, _):
            nonlocal count
            if "spans" not in Path(frame.f_code.co_filename).parts:
                return None
            count += event == "line"
            return trace

        text = "Thought 1: look here\nAction 1: go\nObservation 1: seen\n\n" * steps
        tokenizer = Pieces(*re.findall(r" ?[^\s:]+|\s|:", text))
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            aligned = align(segment(text), tokenizer)
        finally:
            sys.settrace(before)
        assert aligned.span_ids.count(A) == 2 * steps
        return count

    few = lines_run(50)
    assert few > 50 * 10
    assert lines_run(500) <= 10 * few


def records(form):
    with DATA.open(encoding="utf-8") as lines:
        return [record for line in lines if (record := json.loads(line))["format"] == form]


@pytest.mark.skipif(not DATA.exists(), reason="shared/data/hotpotqa.dev.jsonl is not here")
@pytest.mark.parametrize("form", ["react-hotpotqa", "fireact"])
def test_real_transcripts(form):
    """Each thought and action of these two formats is one line, so that lines can be compared."""
    real = [(record, segment(record)) for record in records(form)]
    both = [found for _, found in real if {span.kind for span in found.spans} == {R, A}]
    assert len(real) > 300
    assert len(both) >= 0.99 * len(real)
    for record, found in real:
        lines = re.findall(r"(?m)^(Thought|Action)(?: \d+)?:(.*)$", record["text"])
        assert found.profile == form
        assert labelled(found) == [
            ({"Thought": R, "Action": A}[name], own.strip()) for name, own in lines
        ]
    for _, found in real[::25]:
        for build in TOKENIZERS:
            assert_round_trip(build(), found)
