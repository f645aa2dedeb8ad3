"""From character spans to rows: one tokenisation of the whole text, with character offsets."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from sadkern.spans.kinds import ACT, REASON, UNSUPERVISED
from sadkern.spans.segment import Segmentation, Span

STRADDLES = ("first", "second", "none")
TRUNCATIONS = ("right", "left", "drop", "split")


@dataclass(frozen=True)
class Example:
    """A tokenised trajectory of T tokens.

    `input_ids [T]`. `span_ids [T]`: of rows, where row p predicts token p + 1: the kind of the span
    that token p + 1 belongs to, 0 if to none; the last row has 0. `truncated`: for each kind, how
    many of its tokens `max_length` cut. `length`: of the whole text, what is cut included.
    `straddled`: tokens that hold visible characters of a span
    and others outside it. `uncovered`: visible characters of spans that are in no token at all,
    because the tokenizer drops them; not 0 means that its offsets are to be looked at.
    """

    input_ids: list[int]
    span_ids: list[int]
    truncated: dict[int, int]
    length: int
    straddled: int = 0
    uncovered: int = 0


def align(
    segmentation: Segmentation,
    tokenizer: Any,
    max_length: int | None = None,
    *,
    truncation: str = "right",
    straddle: str = "first",
) -> Example:
    r"""Tokenise a segmentation's text once, and say of each row which span it is trained on.

    A token belongs to the span whose characters it holds, so that " Search" counts although the
    blank before "Search" is outside. The stop after a span belongs to it too: the white space that
    follows up to and including the first token with a newline, a token of the tokenizer's own for
    what ends it (`</think>`, `<|im_end|>`), or the EOS where the text ends before. A stop that is
    part of the span's own last token (".\n") needs no more. Linear in the number of tokens.

    Args:
        segmentation: of `segment`.
        tokenizer: a fast one of transformers. Its special tokens are added as it adds them, and its
            EOS at the end if it has one and did not put it there; none where the text has its own.
        max_length: tokens to keep. What that cuts is counted.
        truncation: where it cuts: "right", the end; "left", the beginning, a BOS excepted; "drop",
            all of what is too long. (`windows` splits it instead.)
        straddle: whose a token is that holds visible characters of a span and others: of "first"
            that of the first span it meets, of "second" that of the last, of "none" nobody's.

    Raises:
        ValueError: a slow tokenizer, a text that is not Unicode (half a surrogate pair),
            `max_length` below 1, an unknown policy.

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
    if truncation not in TRUNCATIONS[:3]:
        hint = ": `windows` does that" if truncation == "split" else ""
        raise ValueError(f"truncation={truncation!r}: expected right, left or drop{hint}")
    whole = _aligned(segmentation, tokenizer, max_length, straddle)
    length = len(whole.ids)
    keep = length if max_length is None else min(max_length, length)
    if keep == length or truncation == "right":
        kept = list(range(keep))
    elif truncation == "drop":
        kept = []
    else:
        has_bos = whole.offsets[0] == (0, 0)
        kept = [*range(has_bos), *range(length - keep + has_bos, length)][:keep]
    return whole.example(kept)


def windows(
    segmentation: Segmentation,
    tokenizer: Any,
    max_length: int | None = None,
    *,
    straddle: str = "first",
) -> list[Example]:
    """As `align`, but a text of more than `max_length` tokens becomes several examples.

    They are cut where a step ends, behind an action's stop, so that each begins with what the
    environment answered. Of a step that is longer by itself the end is cut, and counted.
    """
    whole = _aligned(segmentation, tokenizer, max_length, straddle)
    if max_length is None:
        max_length = len(whole.ids)
    examples, start = [], 0
    ends = [*whole.step_ends, len(whole.ids)]
    while start < len(whole.ids):
        following = ends[bisect_right(ends, start)]
        end = start + max_length
        if following <= end:
            following = end = ends[bisect_right(ends, end) - 1]
        made = whole.example(list(range(start, end)), until=following)
        if any(made.span_ids) or any(made.truncated.values()):
            examples.append(made)
        start = following
    return examples


class _Aligned(NamedTuple):
    """All tokens of a text, and which span each belongs to."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    kinds: list[int]  # [T], of tokens, not of rows
    step_ends: list[int]  # tokens before which a step has ended and another begins
    straddled: int
    uncovered: int

    def example(self, kept: Sequence[int], until: int | None = None) -> Example:
        """Of the tokens `kept`. What is cut is counted over all others, or from the first one kept
        up to `until`."""
        rows = [
            self.kinds[after] if after == token + 1 else UNSUPERVISED
            for token, after in pairwise(kept)
        ]
        rows += [UNSUPERVISED] * bool(kept)
        own = self.kinds[1:] if until is None else self.kinds[kept[0] + 1 : until]
        return Example(
            input_ids=[self.ids[token] for token in kept],
            span_ids=rows,
            truncated={kind: own.count(kind) - rows.count(kind) for kind in (REASON, ACT)},
            length=len(self.ids),
            straddled=self.straddled,
            uncovered=self.uncovered,
        )


def _aligned(
    segmentation: Segmentation, tokenizer: Any, max_length: int | None, straddle: str
) -> _Aligned:
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length {max_length}: expected at least 1, or None")
    if straddle not in STRADDLES:
        raise ValueError(f"straddle={straddle!r}: expected {', '.join(STRADDLES)}")
    text, spans, stops = segmentation.text, segmentation.spans, segmentation.span_stops()
    ids, offsets = _tokenize(text, tokenizer, segmentation.complete)
    owned = _own(text, spans, offsets, straddle)
    added = getattr(tokenizer, "added_tokens_decoder", {}).keys()
    step_ends = []
    for span, stop, last in zip(spans, stops, owned.last_tokens, strict=True):
        if last < 0:
            continue
        reached = _stopped(text, last, stop, ids, offsets, added)
        owned.kinds[last + 1 : reached] = [span.kind] * (reached - last - 1)
        if span.kind == ACT:
            step_ends.append(reached)
    return _Aligned(ids, offsets, owned.kinds, step_ends, owned.straddled, owned.uncovered)


def _tokenize(text: str, tokenizer: Any, complete: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and offsets; an EOS that stands at the end has those of one more character."""
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
    options = {"add_special_tokens": False} if complete else {}
    encoding = tokenizer(text, return_offsets_mapping=True, verbose=False, **options)
    ids = list(encoding["input_ids"])
    offsets = [(start, end) for start, end in encoding["offset_mapping"]]
    eos = tokenizer.eos_token_id
    if eos is not None and not complete:
        if ids[-1:] != [eos]:
            ids.append(eos)
            offsets.append((0, 0))
        if offsets[-1][1] == 0:
            offsets[-1] = (len(text), len(text) + 1)
    return ids, offsets


class _Owned(NamedTuple):
    kinds: list[int]
    last_tokens: list[int]  # of each span, -1 if it has none
    straddled: int
    uncovered: int


def _own(text: str, spans: list[Span], offsets: list[tuple[int, int]], straddle: str) -> _Owned:
    """Which tokens hold characters of which span: one walk along both."""
    kinds = [UNSUPERVISED] * len(offsets)
    last_tokens = []
    straddled = uncovered = token = reached = 0
    counted = -1
    for span in spans:
        reached, first, last, nobodys = max(reached, span.start), -1, -1, []
        # With "second", a token that the span before has taken is this one's too.
        if straddle == "second" and token and offsets[token - 1][1] > span.start:
            token -= 1
        while token < len(offsets) and offsets[token][0] < span.end:
            start, end = offsets[token]
            if end > span.start:
                first, last = (token if first < 0 else first), token
                outside = text[start : span.start] + text[span.end : end]
                if outside.strip():
                    straddled += token != counted
                    counted = token
                    nobodys += [token] * (straddle == "none")
                uncovered += _visible(text[reached:start])
                reached = max(reached, end)
            token += 1
        uncovered += _visible(text[reached : span.end])
        if last >= 0:
            # Whole, since a tokenizer that trims offsets leaves inner blanks without characters.
            kinds[first : last + 1] = [span.kind] * (last + 1 - first)
            for one in nobodys:
                kinds[one] = UNSUPERVISED
        last_tokens.append(last)
    return _Owned(kinds, last_tokens, straddled, uncovered)


def _visible(gap: str) -> int:
    """Characters of a gap between tokens: many a tokenizer leaves white space out, rightly."""
    return sum(len(word) for word in gap.split())


def _stopped(
    text: str, last: int, stop: int, ids: list[int], offsets: list[tuple[int, int]], added: Set[int]
) -> int:
    """One past the last token of the stop that follows token `last`, `last + 1` if there is none.

    It is white space up to a newline, and tokens of the tokenizer's own for an end; where it has
    none (a tag that it takes to pieces), the stop ends before.
    """
    reached = last + 1
    for token in range(last + 1, len(offsets)):
        start, end = offsets[token]
        piece = text[start:end]
        if start >= stop or not (ids[token] in added or start == len(text) or not piece.strip()):
            break
        if ids[token] in added or start == len(text) < end or "\n" in piece:
            reached = token + 1
    return reached
