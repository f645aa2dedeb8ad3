"""Every profile that comes along, on transcripts written for it, and profiles of one's own."""

import pytest
from labelled_records import CASES, ETO
from transcripts import labelled

from sadkern.spans import ACT, PROFILES, REASON, Marker, Profile, load_profile, segment

R, A = REASON, ACT


def test_every_profile_has_cases():
    assert set(CASES) == set(PROFILES)
    assert all(len(cases) >= 5 for cases in CASES.values())


@pytest.mark.parametrize(
    ("profile", "record", "expected"),
    [(name, *case) for name, cases in CASES.items() for case in cases],
)
def test_hand_labelled(profile, record, expected):
    found = segment(record, profile)
    assert labelled(found) == expected
    assert (found.profile, found.warnings) == (profile, [])
    assert segment(record) == found  # and "auto" finds the same one


@pytest.mark.parametrize("name", CASES)
def test_markers_may_be_supervised(name):
    """Then a span begins with its marker, and ends where it did."""
    for record, expected in CASES[name]:
        without, with_markers = (
            segment(record, name, supervise_markers=one) for one in (False, True)
        )
        assert [(span.end, span.kind) for span in with_markers.spans] == [
            (span.end, span.kind) for span in without.spans
        ]
        assert with_markers.stops == without.stops
        longer = 0
        for (kind, text), (_, marked) in zip(expected, labelled(with_markers), strict=True):
            assert marked.endswith(text), kind
            assert marked == marked.strip()
            longer += marked != text
        assert longer or name == "chat"  # whose answers have no marker


MINE = """
name: mine
about: Plans and deeds.
reads: text
signature: '^Plan:'
markers:
  - {match: 'Plan:', kind: reason, until: marker}
  - {match: '<do>', kind: act, until: '</do>', anywhere: true}
  - {match: 'World:'}
"""


def test_a_profile_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(MINE)
    text = "Plan: two\nlines <do>run <b>fast</b></do> World: no\nWorld: <do>again</do>\n"
    found = segment(text, str(path))
    assert found.profile == "mine"
    assert labelled(found) == [(R, "two\nlines"), (A, "run <b>fast</b>"), (A, "again")]
    assert found == segment(text, path) == segment(text, load_profile(path))
    stops = [
        found.text[end:stop] for (_, end, _), stop in zip(found.spans, found.stops, strict=True)
    ]
    assert stops == ["", "</do>", "</do>"]


def test_agentgym_is_written_as_eto():
    for record, _ in ETO:
        assert segment(record, "agentgym") == segment(record, "eto")


def test_the_order_of_markers_decides():
    mine = Profile("mine", (Marker(r"Do: think\b", R), Marker("Do:", A), Marker("Env:")))
    found = segment("Do: think hard\nDo: run\nEnv: Do: no", mine)
    assert (found.profile, labelled(found)) == ("mine", [(R, "hard"), (A, "run")])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("name: mine", "nom: mine"), "mine.yaml: 'nom' is unknown, expected name, about, reads"),
        (("name: mine", ""), "mine.yaml: 'name' is missing"),
        (("reads: text", "reads: books"), "reads 'books', expected text, turns, both"),
        (("signature: '^Plan:'", "signature: '('"), "signature of profile 'mine': expected a reg"),
        (("kind: act", "kind: deed"), r"markers\[1\]: kind 'deed', expected none, reason, act"),
        (("{match: 'World:'}", "{mach: 'World:'}"), r"markers\[2\]: 'mach' is unknown"),
        (("{match: 'World:'}", "{kind: act}"), r"markers\[2\]: 'match' is missing"),
        (("{match: 'World:'}", "World"), r"markers\[2\]: got 'World', expected a mapping"),
        (("match: 'World:'", "match: '(World):'"), "capturing group"),
        (("match: 'World:'", "match: 'W*'"), "matches the empty string"),
        (("</do>", "(</do>"), "until of marker '<do>': expected a regular expression"),
        (("</do>", "x*"), "its end matches the empty string"),
        (("anywhere: true", "anywhere: 1"), r"markers\[1\]: anywhere 1, expected true or false"),
        (("about: Plans", "about: [Plans"), "mine.yaml: expected YAML"),
        ((MINE, "[1]"), r"mine.yaml: got \[1\], expected a mapping"),
        ((MINE, "{name: mine, markers: 3}"), "markers is 3, expected a list"),
    ],
)
def test_a_wrong_profile_is_refused(changed, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(MINE.replace(*changed))
    with pytest.raises(ValueError, match=message):
        load_profile(path)


def test_markers_are_checked():
    for pattern, kind, message in [
        ("(Do):", A, "capturing group"),
        ("(Do:", A, "expected a regular expression"),
        ("x*", A, "matches the empty string"),
        ("Do:", 3, "kind 3, expected 0, 1 or 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            Marker(pattern, kind)
    with pytest.raises(ValueError, match="'none' has no markers"):
        Profile("none", ())
