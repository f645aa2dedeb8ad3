"""sadkern.spans.align: from characters to tokens."""

from __future__ import annotations

import re

import pytest
from labelled_records import CASES
from small_tokenizers import (
    TOKENIZERS,
    Pieces,
    assert_round_trip,
    byte_level,
    metaspace,
    token_kinds,
)
from transcripts import labelled

from sadkern.spans import ACT, REASON, Segmentation, align, segment

R, A = REASON, ACT


@pytest.mark.parametrize("build", TOKENIZERS)
@pytest.mark.parametrize("record", [record for cases in CASES.values() for record, _ in cases])
def test_round_trip(build, record):
    assert_round_trip(build(), segment(record))


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


def test_wrong_arguments_of_align():
    class BertTokenizerOfOld:
        is_fast = False

    with pytest.raises(ValueError, match="BertTokenizerOfOld, which has no character offsets"):
        align(segment("Action: go"), BertTokenizerOfOld())
    with pytest.raises(ValueError, match="max_length 0: expected at least 1"):
        align(segment("Action: go"), byte_level(), max_length=0)
    with pytest.raises(ValueError, match="half a surrogate pair at character 8"):
        align(segment("Action: \ud83d"), byte_level())
