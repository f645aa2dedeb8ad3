"""What `max_length` cuts and where, and whose a token is that straddles a boundary."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import Pieces

from sadkern.spans import ACT, REASON, align, segment, windows

R, A = REASON, ACT


class Characters:
    """A fast tokenizer with a token for each character, and perhaps a BOS and an EOS."""

    is_fast = True

    def __init__(self, bos=False, eos=None):
        self.bos, self.eos_token_id = bos, eos

    def __call__(self, text, **_):
        ids = [1] * self.bos + [ord(x) for x in text]
        offsets = [(0, 0)] * self.bos + [(i, i + 1) for i in range(len(text))]
        return {"input_ids": ids, "offset_mapping": offsets}


TEXT = "Thought: ab\nAction: cd\nObservation: ef\nThought: gh\nAction: ij\nObservation: kl\n"


def counts(example):
    return {kind: example.span_ids.count(kind) for kind in (R, A)}


@pytest.mark.parametrize("truncation", ["right", "left", "drop"])
@pytest.mark.parametrize("bos", [False, True])
def test_what_is_cut_is_counted(truncation, bos):
    tokenizer = Characters(bos=bos, eos=0)
    found = segment(TEXT)
    whole = align(found, tokenizer)
    for length in range(1, len(whole.input_ids) + 2):
        short = align(found, tokenizer, length, truncation=truncation)
        keep = min(length, len(whole.input_ids))
        if truncation == "drop" and keep < len(whole.input_ids):
            assert short.input_ids == short.span_ids == []
        elif truncation == "left" and keep < len(whole.input_ids):
            rest = keep - bos
            tail = whole.input_ids[len(whole.input_ids) - rest :] if rest else []
            assert short.input_ids == [1] * bos + tail
        else:
            assert short.input_ids == whole.input_ids[:keep]
        assert len(short.span_ids) == len(short.input_ids)
        assert short.span_ids[-1:] in ([0], [])
        for kind in (R, A):
            assert counts(short)[kind] + short.truncated[kind] == counts(whole)[kind]


def test_rows_behind_a_cut_on_the_left_predict_what_follows():
    found, tokenizer = segment(TEXT), Characters(bos=True)
    short = align(found, tokenizer, 12, truncation="left")
    # The BOS, then "ervation: kl\n" without its first two: nothing before it is predicted.
    assert "".join(map(chr, short.input_ids[1:])) == TEXT[-11:]
    assert short.span_ids == [0] * 12
    long = align(found, tokenizer, 27, truncation="left")
    kept = "".join(map(chr, long.input_ids[1:]))
    assert kept == TEXT[-26:]
    assert kept.startswith("ction: ij\n")
    supervised = [x for x, kind in zip(kept, [*long.span_ids[:-1]], strict=True) if kind]
    assert "".join(supervised) == "ij\n"


def test_windows_are_cut_where_a_step_ends():
    found, tokenizer = segment(TEXT), Characters()
    first, second = windows(found, tokenizer, 50)
    assert "".join(map(chr, first.input_ids)) == TEXT[:23]  # through "Action: cd\n"
    assert "".join(map(chr, second.input_ids)) == TEXT[23:62]  # from what was observed
    assert first.truncated == second.truncated == {R: 0, A: 0}
    whole = align(found, tokenizer)
    assert [align(found, tokenizer, 200)] == windows(found, tokenizer, 200) == [whole]


def test_of_a_step_that_is_too_long_the_end_is_cut_and_counted():
    found, tokenizer = segment(TEXT), Characters()
    first, second = windows(found, tokenizer, 20)
    assert "".join(map(chr, first.input_ids)) == TEXT[:20]
    assert first.truncated == {R: 0, A: 3}
    assert "".join(map(chr, second.input_ids)) == TEXT[23:43]
    assert second.truncated == {R: 3, A: 3}


steps = st.lists(
    st.sampled_from(["Thought: abc\n", "Action: d\n", "Observation: e\n"]), max_size=12
)


@given(steps, st.integers(1, 90))
@settings(max_examples=200, deadline=None)
def test_windows_hold_every_supervised_token_once(lines, length):
    found, tokenizer = segment("".join(lines)), Characters(eos=0)
    whole = align(found, tokenizer)
    made = windows(found, tokenizer, length)
    assert all(0 < len(x.input_ids) <= length for x in made)
    for kind in (R, A):
        held = sum(counts(x)[kind] + x.truncated[kind] for x in made)
        assert held == counts(whole)[kind]
    if length >= len(whole.input_ids):
        assert made in ([whole], [])
    if not any(any(x.truncated.values()) for x in made):
        joined = [i for x in made for i in x.input_ids]
        assert joined == whole.input_ids[: len(joined)]


@pytest.mark.parametrize(
    ("straddle", "kinds"),
    [("first", [0, R, R, A]), ("second", [0, R, A, A]), ("none", [0, 0, 0, 0])],
)
def test_whose_a_straddling_token_is(straddle, kinds):
    pieces = ["Thought", ": I", " go\nAction: run", " on\nObservation"]
    made = align(segment("".join(pieces)), Pieces(*pieces), straddle=straddle)
    assert [0, *made.span_ids[:-1]] == kinds
    assert made.straddled == 3


def test_unknown_policies_are_refused():
    found, tokenizer = segment(TEXT), Characters()
    with pytest.raises(ValueError, match="truncation='middle': expected right, left or drop"):
        align(found, tokenizer, 5, truncation="middle")
    with pytest.raises(ValueError, match=r"truncation='split': .*: `windows` does that"):
        align(found, tokenizer, 5, truncation="split")
    with pytest.raises(ValueError, match="straddle='both': expected first, second, none"):
        align(found, tokenizer, straddle="both")
    with pytest.raises(ValueError, match="max_length 0: expected at least 1"):
        windows(found, tokenizer, 0)
