"""Records in the shapes that data sets have, files of them, and chats written by a template."""

from __future__ import annotations

import gzip
import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transcripts import chat, labelled
from transformers import PreTrainedTokenizerFast

from sadkern.spans import ACT, REASON, align, segment
from sadkern.spans.files import read_lines
from sadkern.train import prepare

R, A = REASON, ACT

# As Qwen3's: thoughts of turns before the last question are left out; calls in tags.
DROPPING = """
{%- set last = namespace(user=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.index0 > last.user %}
{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}
{%- endif %}
{{- m.content }}
{%- for call in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
# As Mistral's: turns on one line, and the template says what the assistant's are.
MARKING = """
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'assistant' %}{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}
{%- else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}
{%- endfor %}
"""


def byte_tokenizer(template, special=("<s>", "<|im_start|>", "<|im_end|>")):
    """A token for each byte, and tokens of its own for tags."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({x: i for i, x in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<|im_end|>")
    made.add_special_tokens({"additional_special_tokens": list(special)})
    made.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    made.chat_template = template
    return made


def supervised(found, tokenizer):
    """What is trained on, in runs of one kind: (kind, decoded)."""
    made = align(found, tokenizer)
    runs, last = [], 0
    for kind, token in zip([0, *made.span_ids[:-1]], made.input_ids, strict=True):
        if kind and kind == last:
            runs[-1][1].append(token)
        elif kind:
            runs.append((kind, [token]))
        last = kind
    return [(kind, tokenizer.decode(tokens)) for kind, tokens in runs]


CALL = {"function": {"name": "find", "arguments": {"what": "é"}}}
SAID = '{"name": "find", "arguments": {"what": "é"}}'
THINKING = [
    {"role": "system", "content": "Be good."},
    {"role": "user", "content": "Find it."},
    {"role": "assistant", "reasoning_content": "I look.", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "found"},
    {"role": "assistant", "reasoning_content": "So here.", "content": "Here it is."},
    {"role": "user", "content": "Again?"},
    {"role": "assistant", "reasoning_content": "Simple.", "content": "Yes."},
]


def test_a_template_that_drops_thoughts_is_told_of():
    tokenizer = byte_tokenizer(DROPPING)
    found = segment(THINKING, tokenizer=tokenizer)
    assert found.text == tokenizer.apply_chat_template(THINKING, tokenize=False)
    assert labelled(found) == [(A, SAID), (A, "Here it is."), (R, "Simple."), (A, "Yes.")]
    assert found.warnings == ["the chat template leaves out what was thought in some turns"]
    # Tags and special tokens end what they close, and are learnt with it.
    assert supervised(found, tokenizer) == [
        (A, SAID + "\n</tool_call><|im_end|>"),
        (A, "Here it is.<|im_end|>"),
        (R, "Simple.\n</think>"),
        (A, "Yes.<|im_end|>"),
    ]


def test_without_thoughts_before_the_last_question_nothing_is_said():
    kept = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in THINKING[:5]]
    assert segment(kept, tokenizer=byte_tokenizer(DROPPING)).warnings == []


def test_turns_that_the_template_marks_are_taken_from_it():
    tokenizer = byte_tokenizer(MARKING)
    record = chat("Go.", "Thought: where?\nAction: look", "A room.", "Thought: so.\nAction: stop")
    found = segment(record, tokenizer=tokenizer)
    assert found.profile == "eto"
    assert supervised(found, tokenizer) == [
        (R, "where?\n"),
        (A, "look<|im_end|>"),
        (R, "so.\n"),
        (A, "stop<|im_end|>"),
    ]
    # The template wrote its own special tokens: none is added.
    ids = align(found, tokenizer).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.eos_token_id) == 2


@pytest.mark.parametrize("template", [DROPPING, MARKING, None])
def test_turns_that_are_not_to_be_learnt_are_not(template):
    tokenizer = byte_tokenizer(template) if template else None
    record = chat("Go.", "Action: shown", "Seen.", "Action: done")
    record[1]["loss"] = False
    assert labelled(segment(record, tokenizer=tokenizer)) == [(A, "done")]
    del record[1]["loss"]
    record[3]["weight"] = 0
    assert labelled(segment(record, tokenizer=tokenizer)) == [(A, "shown")]


def test_equal_turns_are_told_apart():
    record = chat("a", "Action: go", "a", "Action: go", "Action: go", "Action: go")
    for template in (DROPPING, MARKING):
        found = segment(record, tokenizer=byte_tokenizer(template))
        assert labelled(found) == [(A, "go")] * 3
        places = [found.text[: span.start].count("Action: ") for span in found.spans]
        assert places == [1, 2, 4]  # the user's third is none


def test_templates_that_cannot_are_refused():
    tokenizer = byte_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="template refuses this chat: roles must alternate"):
        segment(chat("a", "b"), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="no chat template: expected one that has"):
        segment(chat("a", "b"), tokenizer=byte_tokenizer(None))


def test_training_writes_chats_by_the_tokenizers_template():
    record = {"messages": chat("Go.", "Thought: where?\nAction: look")}
    tokenizer = byte_tokenizer(DROPPING)
    (example,) = prepare([record], tokenizer)
    text = tokenizer.apply_chat_template(record["messages"], tokenize=False)
    assert tokenizer.decode(example["input_ids"]) == text
    plain = byte_tokenizer(None)
    (example,) = prepare([record], plain)
    written = "<|user|>\nGo.\n<|assistant|>\nThought: where?\nAction: look\n<|im_end|>"
    assert plain.decode(example["input_ids"]) == written


def test_a_chat_written_plainly_ends_its_turns_with_newlines():
    found = segment(chat("Go.", "<think>\nhm\n</think>\nDone."))
    assert found.text == "<|user|>\nGo.\n<|assistant|>\n<think>\nhm\n</think>\nDone.\n"
    tokenizer = byte_tokenizer(None)
    assert supervised(found, tokenizer) == [(R, "hm\n</think>"), (A, "Done.\n")]
    # A tokenizer that has no token for the tag: the newline before it is all there is for an end.
    assert supervised(found, byte_level_alone()) == [(R, "hm\n"), (A, "Done.\n")]


def byte_level_alone():
    made = byte_tokenizer(None)
    inner = Tokenizer(made.backend_tokenizer.model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("<|im_start|>assistant\n", "<|im_end|>"),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        ("<start_of_turn>model\n", "<end_of_turn>"),
    ],
)
def test_a_text_with_its_turns_marked_is_a_chat(before, after):
    text = f"Thought: no, a system's{before}Thought: yes\nAction: go{after}\nAction: no{before}Bye."
    found = segment(text, "eto")
    assert labelled(found) == [(R, "yes"), (A, "go")]
    assert found.text == text
    assert labelled(segment(text, "chat")) == [(A, "Thought: yes\nAction: go"), (A, "Bye.")]


SHAPES = {
    "list": lambda messages: messages,
    "messages": lambda messages: {"messages": messages},
    "conversations": lambda messages: {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
            for m in messages
        ]
    },
    "parts": lambda messages: {
        "messages": [
            {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]}
            for m in messages
        ]
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_a_chat_are_one(shape):
    messages = chat("Go.", "Thought: a\nAction: b", "Seen.", "Thought: c\nAction: d")
    assert segment(SHAPES[shape](messages)) == segment(messages)


@pytest.mark.parametrize("template", [DROPPING, None])
def test_of_an_unknown_role_nothing_is_learnt_and_that_is_said(template):
    tokenizer = byte_tokenizer(template) if template else None
    record = [{"role": "critic", "content": "Action: no"}, *chat("Go.", "Action: yes")]
    found = segment(record, tokenizer=tokenizer)
    assert labelled(found) == [(A, "yes")]
    assert found.warnings == ["roles that are not known and not learnt: critic"]


def test_arguments_that_are_no_json_are_taken_as_they_are():
    calls = [{"function": {"name": "sh", "arguments": "ls {"}}, {"name": "pwd"}]
    found = segment([{"role": "assistant", "content": None, "tool_calls": calls}])
    assert labelled(found) == [
        (A, '{"name": "sh", "arguments": "ls {"}'),
        (A, '{"name": "pwd", "arguments": {}}'),
    ]


RECORDS = [{"text": "Action: a"}, {"messages": chat("é", "b")}, {"text": "Action: c"}]


def as_lines(records):
    return "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in records).encode()


@pytest.mark.parametrize(
    "data",
    [
        as_lines(RECORDS),
        b"\xef\xbb\xbf" + as_lines(RECORDS),
        as_lines(RECORDS).replace(b"\n", b"\r\n\r\n"),
        json.dumps(RECORDS).encode(),
        json.dumps(RECORDS, indent=2).encode(),
        b"\xef\xbb\xbf [" + b",".join(as_lines(RECORDS).splitlines()) + b"]\n",
        gzip.compress(as_lines(RECORDS)),
        gzip.compress(json.dumps(RECORDS, indent=1).encode()),
    ],
    ids=["lines", "bom", "crlf", "array", "indented", "bom array", "gzip", "gzip array"],
)
def test_files_of_any_kind_hold_the_same(data, tmp_path):
    path = tmp_path / "some"
    path.write_bytes(data)
    found = list(read_lines(path))
    assert [line.record for line in found] == RECORDS
    assert not any(line.error for line in found)


def test_lines_that_are_chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    for count in (1, 3):
        path.write_bytes(as_lines([chat("a", "b")] * count))
        assert [(x.number, x.record) for x in read_lines(path)] == [
            (i + 1, chat("a", "b")) for i in range(count)
        ]


def test_a_broken_line_keeps_the_rest(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_bytes(b'["cut off\n' + as_lines(RECORDS[:1]) + b"\xff\n" + as_lines(RECORDS[2:]))
    found = list(read_lines(path))
    assert [(x.number, x.record, bool(x.error)) for x in found] == [
        (1, None, True),
        (2, RECORDS[0], False),
        (3, None, True),
        (4, RECORDS[2], False),
    ]


def test_a_truncated_gzip_names_where_it_ends(tmp_path):
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(as_lines(RECORDS * 4000))[:-20])
    *good, last = read_lines(path)
    assert len(good) > 1000
    assert all(x.record in RECORDS for x in good)
    assert last.number == len(good) + 1
    assert last.error.startswith("the rest of the file cannot be read: ")
