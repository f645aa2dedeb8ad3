"""`sadkern inspect`: what it counts, shows, writes, refuses and survives."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from command import sadkern
from small_models import small_tokenizer
from transcripts import chat

from sadkern.inspect import survey
from sadkern.inspect.overlay import in_terminal
from sadkern.inspect.survey import summary
from sadkern.spans import ACT, REASON, align, segment

RECORDS = [
    {
        "id": "x",
        "env": "kitchen",
        "text": "Thought: abcd\nAction: ef\nObservation: g\nAction: hij\n",
    },
    {"id": "y", "env": "kitchen", "text": "nothing of the kind"},
    {"id": "z", "env": "shop", "messages": chat("Buy.", "<think>why</think>Because.")},
    {"text": "> think: kl\nOK.\n> go\n"},
]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def run(*arguments):
    return sadkern("inspect", *arguments)


def unwrapped(text):
    """Without the blanks and the box of a message, which breaks lines within long paths."""
    return re.sub(r"[\s│]+", "", text)


def test_counts_of_characters(path):
    done = run(path, "--json")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert (found["trajectories"], found["with_spans"], found["coverage"]) == (4, 3, 0.75)
    assert found["unit"] == "characters"
    reason, act = found["spans"]["REASON"], found["spans"]["ACT"]
    assert (reason["count"], reason["total"], reason["max"]) == (3, 4 + 3 + 2, 4)
    assert (act["count"], act["total"], act["median"]) == (4, 2 + 3 + 8 + 2, 2.5)
    assert found["profiles"] == {"fireact": 1, "none": 1, "chat": 1, "react-alfworld": 1}
    assert set(found["environments"]) == {"kitchen", "shop", "some"}
    kitchen = found["environments"]["kitchen"]
    assert (kitchen["trajectories"], kitchen["coverage"]) == (2, 0.5)
    texts = [segment(record).text for record in RECORDS]
    assert found["supervised_share"] == pytest.approx(24 / sum(map(len, texts)))
    (warning,) = found["warnings"]
    assert (warning["count"], warning["first"]) == (1, f"{path}:2")
    assert warning["warning"].startswith("no span found")
    assert found["errors"] == []


def test_counts_of_tokens(path, tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    done = run(path, "--json", "--tokenizer", tmp_path / "tokenizer", "--max-length", 12)
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    made = [align(segment(record), tokenizer, 12) for record in RECORDS]
    assert found["unit"] == "tokens"
    for name, kind in (("REASON", REASON), ("ACT", ACT)):
        assert found["spans"][name]["total"] == sum(x.span_ids.count(kind) for x in made)
        assert found["truncated"][name] == sum(x.truncated[kind] for x in made)
    assert sum(found["truncated"].values()) > 0
    whole = [len(align(segment(record), tokenizer).input_ids) for record in RECORDS]
    assert found["trajectory_length"]["total"] == sum(whole) > sum(len(x.input_ids) for x in made)
    assert found["trajectory_length"]["max"] == max(whole)
    supervised = sum(map(bool, (kind for x in made for kind in x.span_ids)))
    assert found["supervised_share"] == pytest.approx(supervised / sum(whole))
    assert (found["straddled"], found["uncovered"]) == (0, 0)


def test_lines_that_are_no_trajectory_are_named_and_the_rest_goes_on(path):
    with path.open("ab") as file:
        file.write(
            b'{"text": "cut\n{"messages": [{"rolle": "user"}]}\n{"text": "half \\ud83d"}\n7\n'
        )
        file.write(b'{"text": "Action: last"}\n')
    done = run(path, "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert found["trajectories"] == 5
    assert [(x["file"], x["line"]) for x in found["errors"]] == [
        (str(path), i) for i in (5, 6, 7, 8)
    ]
    assert "has no role: expected one of assistant" in found["errors"][1]["error"]
    shown = run(path)
    assert shown.exit_code == 1
    said = unwrapped(shown.stdout)
    assert unwrapped(f"error at {path}:5: Invalid control character") in said


def test_samples_are_shown_in_colour(path):
    text = in_terminal(segment(RECORDS[0]))
    coloured = {str(span.style): text.plain[span.start : span.end] for span in text.spans[1::2]}
    assert text.plain == RECORDS[0]["text"]
    assert coloured == {"bold blue": "abcd", "bold red": "hij"}
    for seed, drawn, left in ((0, "kitchen: x (fireact)", "y"), (3, "kitchen: y (None)", "x")):
        done = run(path, "--samples", 1, "--seed", seed)
        assert drawn in done.stdout
        assert f"kitchen: {left}" not in done.stdout
        assert "shop: z (chat)" in done.stdout
    assert "Thought" not in run(path, "--samples", 0).stdout


def test_a_sample_cannot_steer_the_terminal():
    text = in_terminal(segment("Action: \x1b[2Jgo\x07\x9b31m\r\n")).plain
    assert text == "Action: \u241b[2Jgo\u2407\ufffd31m\n"


def test_long_text_that_is_not_supervised_is_shortened():
    text = in_terminal(segment("ab" * 2500 + "\nAction: go"), shown=10).plain
    assert text == "ababababab [.. 4,989 characters ..] b\nAction: go"


class Page(HTMLParser):
    """Its marks, and whether its elements are closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.marks, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta",):
            self.open.append(tag)
        if tag == "mark":
            self.marks.append([dict(attrs)["class"], ""])

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] == "mark":
            self.marks[-1][1] += data


def test_the_page_is_whole_and_escapes_what_it_shows(path, tmp_path):
    with path.open("a") as file:
        record = {
            "env": "<b>",
            "text": 'Thought: <script>alert(1)</script> & "more"\nAction: </pre>',
        }
        file.write(json.dumps(record) + "\n{}\n")
    html, png = tmp_path / "report.html", tmp_path / "lengths.png"
    assert run(path, "--html", html, "--png", png, "--samples", 2).exit_code == 1
    text = html.read_text()
    page = Page(text)
    assert page.open == []
    assert "<script" not in text
    assert ["reason", '<script>alert(1)</script> & "more"'] in page.marks
    assert ["act", "</pre>"] in page.marks
    assert ["reason", "abcd"] in page.marks
    assert text.count("<svg") == 1
    assert not re.search(r"(?:src|href)=[\"']http", text)
    assert f"{path}:6: record has []" in page.text
    assert png.read_bytes().startswith(b"\x89PNG")


def test_several_files_and_gzip(path, tmp_path):
    other = tmp_path / "other.jsonl.gz"
    other.write_bytes(gzip.compress(path.read_bytes()))
    found = json.loads(run(path, other, "--json").stdout)
    assert found["trajectories"] == 8
    assert found["files"] == [str(path), str(other)]
    assert set(found["environments"]) == {"kitchen", "shop", "some", "other"}


def test_a_profile_can_be_named(path, tmp_path):
    found = json.loads(run(path, "--json", "--profile", "react-alfworld").stdout)
    assert found["with_spans"] == 1
    own = tmp_path / "own.yaml"
    own.write_text("name: own\nmarkers:\n  - {match: 'nothing of', kind: act}\n")
    found = json.loads(run(path, "--json", "--profile", own).stdout)
    assert (found["with_spans"], found["profiles"]) == (1, {"own": 4})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "mine"], "profile 'mine': expected auto, react-webshop"),
        (["--profile", "missing.yaml"], "missing.yaml"),
        (["--max-length", "5"], "expected a --tokenizer beside it"),
        (["--tokenizer", "no/such/folder"], "no/such/folder"),
    ],
)
def test_wrong_options_are_refused(arguments, message, path):
    done = run(path, *arguments)
    assert done.exit_code == 2
    assert unwrapped(message) in unwrapped(done.output)
    missing = run(path.parent / "none.jsonl")
    assert missing.exit_code == 2
    assert unwrapped("none.jsonl: expected a file") in unwrapped(missing.output)


def test_samples_are_drawn_alike(tmp_path):
    path = tmp_path / "many.jsonl"
    lines = [json.dumps({"id": str(i), "text": f"Action: {i}"}) for i in range(20)]
    path.write_text("\n".join(lines))
    drawn = [
        one.name for seed in range(300) for one in survey([path], samples=2, seed=seed).samples
    ]
    assert len(drawn) == 600
    counts = [drawn.count(str(i)) for i in range(20)]
    assert max(counts) < 60 > min(counts) > 8  # 30 each, give or take five deviations


def test_summary_of_lengths():
    assert summary([]) == {"count": 0, "total": 0, "median": 0, "p95": 0, "max": 0}
    assert summary([7]) == {"count": 1, "total": 7, "median": 7, "p95": 7, "max": 7}
    found = summary(list(range(1, 102)))
    assert (found["median"], found["p95"], found["max"]) == (51, 96, 101)


def test_it_runs_as_a_command_and_json_is_all_it_prints(path):
    done = subprocess.run(
        [sys.executable, "-m", "sadkern.cli", "inspect", str(path), "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["trajectories"] == 4
    assert done.stdout.count("\n") == 1
