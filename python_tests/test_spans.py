"""sadkern.spans.segment: what is supervised, to the character, of any text whatever."""

import json
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_tokenizers import TOKENIZERS, Pieces, assert_round_trip, byte_level, metaspace
from transcripts import chat, labelled

from sadkern.spans import ACT, PROFILES, REASON, Span, align, segment

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "hotpotqa.dev.jsonl"
R, A = REASON, ACT


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
profiles = st.sampled_from(["auto", *PROFILES])


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
@pytest.mark.parametrize("name", PROFILES)
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
