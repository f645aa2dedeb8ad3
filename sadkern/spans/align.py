"""From character spans to rows: one tokenisation of the whole text, with character offsets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from sadkern.spans.profiles import ACT, REASON, UNSUPERVISED
from sadkern.spans.segment import Segmentation, Span


@dataclass(frozen=True)
class Example:
    """A tokenised trajectory of T tokens.

    `input_ids [T]`. `span_ids [T]`: of rows, where row p predicts token p + 1: the kind of the span
    that token p + 1 belongs to, 0 if to none; the last row has 0. `truncated`: for each kind, how
    many of its tokens `max_length` cut. `straddled`: tokens that hold visible characters of a span
    and others outside it. `uncovered`: visible characters of spans that are in no token at all,
    because the tokenizer drops them; not 0 means that its offsets are to be looked at.
    """

    input_ids: list[int]
    span_ids: list[int]
    truncated: dict[int, int]
    straddled: int = 0
    uncovered: int = 0


def align(segmentation: Segmentation, tokenizer: Any, max_length: int | None = None) -> Example:
    r"""Tokenise a segmentation's text once, and say of each row which span it is trained on.

    A token belongs to the span whose characters it holds, so that " Search" counts although the
    blank before "Search" is outside; a token that holds characters of two spans belongs to the
    first. The stop after a span belongs to it too: the white space that follows up to and including
    the first token with a newline, or the EOS where the text ends before one. A stop that is part
    of the span's own last token (".\n") needs no more.

    `tokenizer`: a fast one of transformers. Its special tokens are added as it adds them, and its
    EOS at the end if it has one and did not put it there. `max_length`: tokens to keep, from the
    left; what that cuts is counted. ValueError: a slow tokenizer, a text that is not Unicode (half
    a surrogate pair), or `max_length` below 1. Linear in the number of tokens.

    Source: Structured Agent Distillation, appendix D.2 and F.1, except that no span is tokenised
    by itself: merges differ there.

    >>> import re
    >>> from sadkern.spans import segment
    >>> class Pieces:  # stands in for a tokenizer of transformers
    ...     is_fast, eos_token_id = True, 0
    ...     def __call__(self, text, **_):
    ...         offsets = [match.span() for match in re.finditer(r" ?\w+|\s|[^\w\s]", text)]
    ...         ids = list(range(1, len(offsets) + 1))
    ...         return {"input_ids": ids, "offset_mapping": offsets}
    >>> found = segment("Reasoning: find the fridge\nAction: goto kitchen")
    >>> align(found, Pieces()).span_ids  # Reasoning, :, find, the, fridge, \n, Action, :, goto, ..
    [0, 1, 1, 1, 1, 0, 0, 2, 2, 2, 0]
    >>> short = align(found, Pieces(), max_length=4)
    >>> short.input_ids, short.span_ids, short.truncated
    ([1, 2, 3, 4], [0, 1, 1, 0], {1: 2, 2: 3})
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length {max_length}: expected at least 1, or None")
    ids, offsets = _tokenize(segmentation.text, tokenizer)
    owned = _own(segmentation.text, segmentation.spans, offsets)
    kinds = owned.kinds
    for span, last in owned.last_tokens:
        for token in range(last + 1, _stop(segmentation.text, span, last, offsets)):
            kinds[token] = span.kind
    keep = len(ids) if max_length is None else min(max_length, len(ids))
    return Example(
        input_ids=ids[:keep],
        span_ids=[*kinds[1:keep], UNSUPERVISED][:keep],
        truncated={kind: kinds[keep:].count(kind) for kind in (REASON, ACT)},
        straddled=owned.straddled,
        uncovered=owned.uncovered,
    )


def _tokenize(text: str, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer is a {type(tokenizer).__name__}, which has no character offsets: expected "
            "a fast one (AutoTokenizer.from_pretrained, or PreTrainedTokenizerFast around a "
            "tokenizers.Tokenizer)"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text has half a surrogate pair at character {error.start}: expected valid Unicode"
        ) from error
    # Not verbose: it would warn of a length beyond the model's, which max_length is there for.
    encoding = tokenizer(text, return_offsets_mapping=True, verbose=False)
    ids = list(encoding["input_ids"])
    offsets = [(start, end) for start, end in encoding["offset_mapping"]]
    eos = tokenizer.eos_token_id
    if eos is not None and ids[-1:] != [eos]:
        ids.append(eos)
        offsets.append((0, 0))
    return ids, offsets


class _Owned(NamedTuple):
    kinds: list[int]  # [T], of tokens, not yet of rows
    last_tokens: list[tuple[Span, int]]
    straddled: int
    uncovered: int


def _own(text: str, spans: list[Span], offsets: list[tuple[int, int]]) -> _Owned:
    """Which tokens hold characters of which span: one walk along both."""
    kinds = [UNSUPERVISED] * len(offsets)
    last_tokens = []
    straddled = uncovered = token = reached = 0
    for span in spans:
        reached, first, last = max(reached, span.start), -1, -1
        while token < len(offsets) and offsets[token][0] < span.end:
            start, end = offsets[token]
            if end > span.start:
                first, last = (token if first < 0 else first), token
                outside = text[start : span.start] + text[span.end : end]
                straddled += bool(outside.strip())
                uncovered += _visible(text[reached:start])
                reached = max(reached, end)
            token += 1
        uncovered += _visible(text[reached : span.end])
        if last >= 0:
            # Whole, since a tokenizer that trims offsets leaves inner blanks without characters.
            kinds[first : last + 1] = [span.kind] * (last + 1 - first)
            last_tokens.append((span, last))
    return _Owned(kinds, last_tokens, straddled, uncovered)


def _visible(gap: str) -> int:
    """Characters of a gap between tokens: many a tokenizer leaves white space out, rightly."""
    return sum(len(word) for word in gap.split())


def _stop(text: str, span: Span, last: int, offsets: list[tuple[int, int]]) -> int:
    """One past the last token of the stop after a span; `last + 1` if there is none."""
    if "\n" in text[span.end : offsets[last][1]]:
        return last + 1
    for token in range(last + 1, len(offsets)):
        start, end = offsets[token]
        piece = text[start:end]
        if piece and not piece.isspace():
            break
        # Only special tokens have (0, 0): a trimmed blank has its place, if no characters.
        if "\n" in piece or (end == 0 and token == len(offsets) - 1):
            return token + 1
    return last + 1
