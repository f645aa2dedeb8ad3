"""Captures of DistillKit and axolotl give the teacher's numbers: bytes in, logarithms out."""

from __future__ import annotations

import json
import logging
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from command import sadkern
from pyarrow import parquet
from small_models import small_tokenizer

from sadkern.store import Identity, IdentityError, Store, content_key, tokenizer_identity
from sadkern.store.care import verify
from sadkern.teacher import CachedTeacher, MissingError
from sadkern.teacher.imports import Axolotl, DistillKit, Importer, import_files, load_config

IDS = [3, 7, 300, 9, 1, 42]
LOGPROBS = [-0.5, -1.5, -2, -2.5, -3, -4.5]
PACKED_IDS = "0181e5809008a8"
# Written by DistillKit of IDS and LOGPROBS: keys of its config, bytes, what it reads in them.
F32 = "000000bf 0000c0bf"
CURRENT = {
    "exact": (
        {"exact_k": 6, "delta_encoding": False},
        f"{F32} 000000c0 000020c0 000040c0 000090c0",
        LOGPROBS,
    ),
    "bfloat16": (
        {"exact_k": 6, "exact_dtype": "bfloat16", "delta_encoding": False},
        "00bf c0bf 00c0 20c0 40c0 90c0",
        LOGPROBS,
    ),
    "float16, delta": (
        {"exact_k": 6, "exact_dtype": "float16"},
        "00b8 00bc 00b8 00b8 00b8 00be",
        LOGPROBS,
    ),
    "polynomial": (
        {
            "exact_k": 2, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, "sqrt"],
            "delta_encoding": False,
        },
        "00bf c0bf 776801c0 b426b8bf f0b6913f",
        [-0.5, -1.5, -2.022001, -2.322287, -3.289429, -4.366286],
    ),
    "normalize_t": (
        {"exact_k": 2, "polynomial_terms": [0, 1], "normalize_t": True, "delta_encoding": False},
        f"{F32} 6c66e6bf 989919c0",
        [-0.5, -1.5, -1.800001, -2.600001, -3.4, -4.2],
    ),
    "residuals": (
        {
            "exact_k": 2, "delta_encoding": False,
            "residual_bins": [{"scale_dtype": "float16", "element_bits": 3, "num_elements": 3}],
        },
        f"{F32} 003a 2400",
        [-0.5, -1.5, -2.25, -2.25, -3, 0],
    ),
    "polynomial, residuals": (
        {
            "exact_k": 2, "polynomial_terms": [0, 1], "delta_encoding": False,
            "residual_bins": [
                {"scale_dtype": "float32", "element_bits": 4, "num_elements": 3},
                {"scale_dtype": "bfloat16", "element_bits": 1, "num_elements": 1},
            ],
        },
        f"{F32} 6c66e6bf cacc4cbf d8cc4c3d 4af0 9a3e 00",
        [-0.5, -1.5, -2.000001, -2.5, -3.05, -4.500782],
    ),
    "residuals, delta": (
        {
            "exact_k": 2,
            "residual_bins": [{"scale_dtype": "float16", "element_bits": 8, "num_elements": 4}],
        },
        "000000bf 000080bf 0022 55565500",
        [-0.5, -1.5, -2.00390625, -2.49609375, -3, -4.5],
    ),
    "polynomial, delta": (
        {"exact_k": 1, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, "sqrt"]},
        "00bf 94ac84bf e68e54bf 6f8bc53f",
        [-0.5, -1.5390625, -1.859375, -2.375, -3.234375, -4.5],
    ),
}  # fmt: skip
SMALL = {
    "d": 512, "k": 3, "exact_k": 3, "exact_dtype": "bfloat16", "polynomial_terms": None,
    "residual_bins": [], "delta_encoding": False,
}  # fmt: skip
TOKENS = [3, 9, 511, 0]
ENTRIES = [
    {3: -0.5, 7: -1.5, 300: -2.0},
    {9: -0.25, 1: -1.75, 5: -3.0},
    {511: -1.0, 0: -1.25, 256: -4.0},
]
EXCESS = float(np.logaddexp.reduce(list(ENTRIES[1].values())))  # of 0.24% above a mass of 1
SERVED = [ENTRIES[0], {token: x - EXCESS for token, x in ENTRIES[1].items()}, ENTRIES[2]]


def octets(text):
    return list(bytes.fromhex(text))


def small_row(tokens=TOKENS):
    """As DistillKit writes it: ids in the order of their values."""
    return {
        "input_ids": tokens,
        "bytepacked_indices": [octets("0181e580"), octets("048040a0"), octets("ff802000")],
        "compressed_logprobs": [
            octets("00bfc0bf00c0"),
            octets("80bee0bf40c0"),
            octets("80bfa0bf80c0"),
        ],
    }


LISTS = {
    "input_ids": pa.list_(pa.uint64()),
    "bytepacked_indices": pa.list_(pa.list_(pa.uint8())),
    "compressed_logprobs": pa.list_(pa.list_(pa.uint8())),
    "attention_mask": pa.list_(pa.int64()),
    "target_logprobs": pa.list_(pa.list_(pa.float32())),
    "target_token_ids": pa.list_(pa.list_(pa.int64())),
    "target_mask": pa.list_(pa.list_(pa.int64())),
}


def write_parquet(path, rows, **options):
    schema = pa.schema([(name, LISTS[name]) for name in rows[0]])
    parquet.write_table(pa.Table.from_pylist(rows, schema), path, **options)
    return path


@pytest.fixture
def capture(tmp_path):
    """A parquet file of DistillKit and what it writes beside it."""
    (tmp_path / "compression_config.yaml").write_text(yaml.safe_dump(SMALL))
    return write_parquet(tmp_path / "data_0.parquet", [small_row()])


def ask(path, tokens, positions):
    """What a run is given: of each position its entries, and their sum with the tail."""
    tokens = torch.tensor([tokens])
    found = CachedTeacher(path)(
        torch.tensor(positions), input_ids=tokens, attention_mask=torch.ones_like(tokens)
    )
    mass = found.logprobs.double().exp().sum(-1) + found.tail_mass
    torch.testing.assert_close(mass, torch.ones_like(mass), atol=1e-6, rtol=0)
    return [
        {i: x for i, x in zip(ids, row, strict=True) if i >= 0}
        for ids, row in zip(found.ids.tolist(), found.logprobs.tolist(), strict=True)
    ]


def assert_entries(found, expected):
    """To the store's stated error: of each, and of what all of a row are shifted by."""
    assert [set(row) for row in found] == [set(row) for row in expected]
    for row, other in zip(found, expected, strict=True):
        bound = [1.3e-4 * np.sqrt(1 + x**2) for x in other.values()]
        for (token, x), own in zip(other.items(), bound, strict=True):
            assert abs(row[token] - x) <= own + max(bound), (token, row[token], x)


@pytest.mark.parametrize("name", CURRENT)
def test_distillkit_bytes_are_what_distillkit_reads_in_them(name):
    config, values, expected = CURRENT[name]
    source = DistillKit({"d": 512, "k": 6, "residual_bins": [], **config})
    assert (source.k, source.vocab) == (6, 512)
    rows = source.read(
        {
            "input_ids": [1, 2, 3],
            "bytepacked_indices": [octets(PACKED_IDS)] * 2,
            "compressed_logprobs": [octets(values)] * 2,
        }
    )
    assert rows.ids.tolist() == [IDS, IDS]
    assert rows.positions.tolist() == [0, 1]
    found = rows.logprobs
    if name == "polynomial, delta":  # DistillKit rounds what it has summed up, and this does not
        found = torch.from_numpy(found).bfloat16().float().numpy()
    tolerance = 2e-6 if name in ("polynomial", "normalize_t", "polynomial, residuals") else 0
    np.testing.assert_allclose(found, [expected] * 2, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("vocab", "words"),
    [(512, [1477813633814019]), (129280, [0x4B0000E0003, 0xA800020009])],
)
def test_distillkit_before_is_read_too(vocab, words):
    source = DistillKit({"k": 6, "exact_k": 2, "polynomial_degree": 2, "vocab_size": vocab})
    row = {
        "input_ids": [1, 2],
        "packed_indices": [words],
        "exact_values": [[-0.5, -1.5]],
        "coeffs": [[-7.35840893, 14.89911652, -9.55752754]],
    }
    rows = source.read(row)
    expected = np.array([-0.5, -1.5, -2.0168, -2.2982, -3.4540, -4.2310])
    assert rows.ids.tolist() == [IDS]
    # They are known up to a constant.
    shifted = expected - np.logaddexp.reduce(expected)
    np.testing.assert_allclose(rows.logprobs[0], shifted, atol=5e-5)
    with_sqrt = DistillKit(
        {
            "k": 3, "exact_k": 1, "polynomial_degree": 1, "vocab_size": vocab,
            "invert_polynomial": False, "with_sqrt_term": True,
        }
    )  # fmt: skip
    row |= {"packed_indices": [words[:1]], "exact_values": [[0.0]], "coeffs": [[1.0, -2.0, 0.5]]}
    values = np.array([0, 1 - 2 + 0.5, 1 - 4 + 0.5 * 2**0.5])
    found = with_sqrt.read(row)
    assert found.ids.tolist() == [IDS[:3]]
    np.testing.assert_allclose(found.logprobs[0], values - np.logaddexp.reduce(values), rtol=1e-12)


def test_a_slot_that_was_not_filled_has_no_entry(tmp_path):
    """Nor does its id, which is whatever was in memory; differences past it are NaN."""
    one, infinite, nan = "000080bf", "000080ff", "0000c07f"
    row = {
        "input_ids": [1, 2, 3],
        "bytepacked_indices": [octets("0181e580"), octets("0180c060")],  # 3, 7, 300; 3 thrice
        "compressed_logprobs": [octets(one * 3), octets(one + infinite + nan)],
    }
    config = {"d": 512, "k": 3, "exact_k": 3, "residual_bins": []}
    store = Store.create(tmp_path, Identity("topk", k=3, temperature=1.0, vocab=512))
    with Importer(store, DistillKit(config)) as importer:
        importer.add("rows", [row])
    assert_entries(ask(tmp_path, [1, 2, 3], [0, 1]), [{3: -1, 7: -2, 300: -3}, {3: -1}])
    columns = store.read(content_key([1, 2, 3]))
    np.testing.assert_allclose(columns["tail_mass"][1], 1 - np.exp(-1), rtol=1e-6)


def test_a_parquet_file_becomes_a_cache_that_serves(capture, tmp_path):
    done = sadkern(
        "cache", "import", capture, "--format", "distillkit", "--teacher", "large",
        "--revision", "r1", "--output", tmp_path / "cache",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "1 trajectories added, 0 were there, 0 rows left out, 1 in all" in done.output
    store = Store.open(tmp_path / "cache")
    assert store.identity == Identity("topk", 3, 1.0, 512, teacher="large", revision="r1")
    assert_entries(ask(tmp_path / "cache", TOKENS, [0, 1, 2]), SERVED)
    assert verify(tmp_path / "cache") == []
    columns = store.read(content_key(TOKENS))
    # Of the actual next tokens 9, 511 and 0; the first two are not among the entries.
    np.testing.assert_allclose(columns["label_logprob"], [np.nan, np.nan, -1.25])
    for row, entropy, tail in zip(ENTRIES, columns["entropy"], columns["tail_mass"], strict=True):
        p = np.exp(list(row.values()))
        rest = max(1 - p.sum(), 0)
        p = np.append(p / max(p.sum(), 1), rest)
        np.testing.assert_allclose(tail, rest, atol=1e-6)
        np.testing.assert_allclose(entropy, -(p[p > 0] * np.log(p[p > 0])).sum(), rtol=1e-5)


def test_what_is_there_is_not_imported_again(capture, tmp_path):
    more = write_parquet(tmp_path / "data_1.parquet", [small_row(), small_row([4, 5, 6, 7])])
    options = {"teacher": "large", "progress": False, "shard_bytes": 1}
    source = DistillKit(SMALL)
    first = import_files(tmp_path / "cache", [capture], source, **options)
    assert (first.added, first.there) == (1, 0)
    # A kill between writing and sealing.
    interrupted = Store.open(tmp_path / "cache").writer("import-0")
    record = first.store.read(content_key(TOKENS))
    with interrupted:
        interrupted.add([(content_key([8, 8, 8, 8]), record)])
    second = import_files(tmp_path / "cache", [capture, more], source, **options)
    assert (second.added, second.there, len(second.store)) == (1, 2, 3)
    assert second.store.leftovers() == []
    with pytest.raises(IdentityError, match="teacher is large there and small here"):
        import_files(tmp_path / "cache", [more], source, **{**options, "teacher": "small"})


def test_a_row_for_the_last_token_is_dropped(tmp_path):
    longer, shorter = small_row(TOKENS[:3]), small_row([*TOKENS, 5])
    store = Store.create(tmp_path, Identity("topk", k=3, temperature=1.0, vocab=512))
    with Importer(store, DistillKit(SMALL)) as importer:
        importer.add("rows", [longer, shorter])
    assert (importer.added, importer.left_out) == (1, 1)
    assert store.positions(content_key(TOKENS[:3])).tolist() == [0, 1]
    with pytest.raises(MissingError):
        ask(tmp_path, TOKENS[:3], [2])


def test_malformed_rows_are_named_and_the_rest_survives(tmp_path, caplog):
    short = {**small_row(), "bytepacked_indices": [octets("0181e5")] * 3}
    nan = {**small_row(), "compressed_logprobs": [octets("00bfc07f00c0")] * 3}
    twice = {**small_row(), "bytepacked_indices": [octets("0180c060")] * 3}
    large = small_row([3, 9, 512, 0])
    twice["input_ids"] = [1, 2, 3, 4]
    empty = {**small_row([4, 3, 2, 1]), "compressed_logprobs": None}
    rows = [short, nan, small_row(), twice, large, empty]
    path = write_parquet(tmp_path / "data.parquet", rows, row_group_size=2)
    lost = write_parquet(tmp_path / "lost.parquet", rows)
    lost.write_bytes(lost.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING):
        done = import_files(
            tmp_path / "cache", [lost, path], DistillKit(SMALL), teacher="t", progress=False
        )
    assert (done.added, done.left_out) == (1, 6)
    said = caplog.text
    assert f"{path}:1 left out: bytepacked_indices has 3 for each position: expected 4" in said
    assert f"{path}:2 left out: a log-probability is NaN or infinite" in said
    assert f"{path}:4 left out: a token is twice among a position's entries" in said
    assert f"{path}:5 left out: input_ids are not all below 512" in said
    assert f"{path}:6 left out: no column 'compressed_logprobs' or nothing in it" in said
    assert f"{lost}:1 left out: the file cannot be read" in said
    assert_entries(ask(tmp_path / "cache", TOKENS, [0, 1, 2]), SERVED)


def test_a_damaged_row_group_is_named_and_the_others_are_read(tmp_path, caplog):
    rows = [small_row([i, i, i, i]) for i in range(6)]
    path = write_parquet(
        tmp_path / "data.parquet", rows, row_group_size=2, write_page_checksum=True
    )
    column = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    begin = column.dictionary_page_offset or column.data_page_offset
    data[begin : begin + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        done = import_files(
            tmp_path / "cache", [path], DistillKit(SMALL), teacher="t", progress=False
        )
    assert (done.added, done.left_out) == (4, 2)
    assert f"{path}:3, 4 left out: row group 1 of 3 cannot be read" in caplog.text


def test_packs_are_refused_by_name(tmp_path, caplog):
    row = {**small_row(), "attention_mask": [1, 1, 2, 2]}
    path = write_parquet(tmp_path / "data.parquet", [row])
    done = sadkern(
        "cache", "import", path, "--format", "distillkit", "--teacher", "t", "--vocab", 512,
        "--output", tmp_path / "cache",
    )  # fmt: skip
    assert done.exit_code == 2
    assert "no sequence could be read" in done.output
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"teacher": {"logprob_compressor": SMALL}})
    )
    done = sadkern(
        "cache", "import", path, "--format", "distillkit", "--teacher", "t",
        "--config", tmp_path / "config.yaml", "--output", tmp_path / "cache",
    )  # fmt: skip
    assert done.exit_code == 2
    assert "no sequence could be read (1 rows were left out" in done.output
    assert f"{path}:1 left out: attention_mask numbers the documents of a pack" in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"exact_k": 4}, "exact_k=4"),
        ({"d": None}, r"lacks \['d'\]"),
        ({"k": "three"}, "k='three'"),
        ({"codec": 2}, r"has \['codec'\] that is not known"),
        ({"exact_dtype": "float8"}, "dtype 'float8': expected one of float16"),
        ({"exact_k": 1, "polynomial_terms": ["log"]}, "expected whole numbers, 'sqrt' or 'exp'"),
        ({"residual_bins": [{"element_bits": 1}]}, "lacks .*scale_dtype"),
        (
            {"residual_bins": [{"scale_dtype": "float16", "element_bits": 1, "num_elements": 1}]},
            "more elements than k - exact_k = 0",
        ),
    ],
)
def test_a_config_that_does_not_hold_together_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        DistillKit({**SMALL, **change})


def test_a_file_that_is_no_config_is_refused(tmp_path):
    path = tmp_path / "compression_config.yaml"
    for text in ("teacher: {kind: hf}", "- 1", "a: [", ""):
        path.write_text(text)
        with pytest.raises(ValueError, match=str(path)):
            load_config(path)


def test_a_mass_above_one_is_told_and_taken_back_to_one(tmp_path, caplog):
    row = {"input_ids": [1, 2, 3], "token_ids": [[3, 4]] * 2, "top_values": [[0.5, -1], [-1, -2]]}
    store = Store.create(tmp_path, Identity("topk", k=2, temperature=1.0, vocab=512))
    with caplog.at_level(logging.WARNING), Importer(store, DistillKit()) as importer:
        importer.add("rows", [row])
    assert "1 of 2 rows had a mass above 1" in caplog.text
    total = np.logaddexp(0.5, -1)
    expected = [{3: 0.5 - total, 4: -1 - total}, {3: -1, 4: -2}]
    assert_entries(ask(tmp_path, [1, 2, 3], [0, 1]), expected)


READY = {
    "input_ids": [5, 6, 7, 8, 0],
    "attention_mask": [1, 1, 1, 1, 0],
    "target_logprobs": [
        [-float("inf")] * 2, [-0.25, float(np.log(1 - np.exp(-0.25)))], [-1e9, 0.0],
        [-0.5, float(np.log(1 - np.exp(-0.5)))], [-1e9] * 2,
    ],
    "target_token_ids": [[0, 0], [7, 9], [0, 8], [1, 2], [0, 0]],
    "target_mask": [[0, 0], [1, 1], [0, 1], [1, 1], [0, 0]],
}  # fmt: skip
OWN = [{7: -0.25, 9: np.log(1 - np.exp(-0.25))}, {8: 0.0}, {1: -0.5, 2: np.log(1 - np.exp(-0.5))}]


@pytest.mark.parametrize("written", ["jsonl", "parquet"])
@pytest.mark.parametrize(("align", "positions"), [("next", [1, 2]), ("same", [0, 1, 2])])
def test_axolotl_columns_become_a_cache_that_serves(tmp_path, written, align, positions):
    path = tmp_path / f"data.{written}"
    if written == "parquet":
        write_parquet(path, [READY])
    else:
        path.write_text(json.dumps(READY) + "\n{cut off\n")
    done = sadkern(
        "cache", "import", path, "--format", "axolotl", "--teacher", "large", "--vocab", 16,
        "--align", align, "--temperature", 2, "--output", tmp_path / "cache",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    store = Store.open(tmp_path / "cache")
    assert store.identity == Identity("topk", 2, 2.0, 16, teacher="large")
    # Without padding, without rows that nothing is known of, without one for the last token.
    assert store.positions(content_key([5, 6, 7, 8])).tolist() == positions
    assert_entries(ask(tmp_path / "cache", [5, 6, 7, 8], positions), OWN[: len(positions)])


def test_padding_on_the_left_is_cut(tmp_path):
    row = {name: column[-1:] + column[:-1] for name, column in READY.items()}
    store = Store.create(tmp_path, Identity("topk", k=2, temperature=1.0, vocab=16))
    with Importer(store, Axolotl()) as importer:
        importer.add("rows", [row])
    assert_entries(ask(tmp_path, [5, 6, 7, 8], [1, 2]), OWN[:2])


@pytest.mark.parametrize("named", [False, True])
def test_raw_logprobs_are_of_the_last_tokens(tmp_path, named):
    ids, logprobs = [[7, 9], [8, 1], [3]], [[-0.25, -2.0], [-0.5, -1.5], [-0.125]]
    row = {"input_ids": [5, 6, 7, 8, 3], "logprobs": logprobs, "target_token_ids": ids}
    if named:
        row["logprobs"] = [
            [{"token": f"token_id:{i}", "logprob": x} for i, x in zip(*pair, strict=True)]
            for pair in zip(ids, logprobs, strict=True)
        ]
        del row["target_token_ids"]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row))
    done = import_files(
        tmp_path / "cache", [path], Axolotl("same"), teacher="t", vocab=16, progress=False
    )
    assert done.added == 1
    found = ask(tmp_path / "cache", row["input_ids"], [1, 2, 3])
    assert_entries(found, [{7: -0.25, 9: -2}, {8: -0.5, 1: -1.5}, {3: -0.125}])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target_token_ids": [[1, 2]] * 4}, r"target_token_ids is \[4, 2\] and target_logprobs"),
        ({"target_mask": [[1]] * 5}, r"target_mask is \[5, 1\]: expected \[5, 2\]"),
        ({"input_ids": [1, 2]}, "5 target_logprobs and 2 input_ids"),
        ({"input_ids": [1.5] * 5}, "input_ids has numbers that are not of int64"),
        ({"input_ids": None}, "no column 'input_ids'"),
        ({"input_ids": "words"}, "input_ids is not a list of numbers"),
        ({"target_logprobs": [1, 2]}, "target_logprobs is not a list of lists"),
        ({"target_logprobs": None}, "expected target_logprobs, or logprobs beside input_ids"),
        (
            {"target_logprobs": None, "logprobs": [[{"token": "cat", "logprob": -1}]]},
            "logprobs name tokens by text",
        ),
        (
            {"target_logprobs": None, "logprobs": [[{"token": "token_id:1"}]]},
            "an entry without a token and its logprob",
        ),
        (
            {"target_logprobs": None, "logprobs": [[-1.0]] * 6, "target_token_ids": [[1]] * 6},
            "6 logprobs and 5 input_ids",
        ),
    ],
)
def test_axolotl_rows_that_do_not_hold_together_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        Axolotl().read({**READY, **change})


@pytest.mark.parametrize(("align", "right"), [("next", "same"), ("same", "next")])
def test_rows_that_seem_to_be_shifted_are_told(tmp_path, caplog, align, right):
    tokens = np.random.default_rng(0).integers(0, 500, 200)
    target = tokens if right == "same" else np.append(tokens[1:], 0)
    row = {
        "input_ids": tokens.tolist(),
        "target_token_ids": target[:, None].tolist(),
        "target_logprobs": [[-0.5]] * 200,
    }
    for given, warned in ((align, True), (right, False)):
        caplog.clear()
        path = tmp_path / given
        store = Store.create(path, Identity("topk", k=1, temperature=1.0, vocab=500))
        with Importer(store, Axolotl(given)) as importer:
            importer.add("rows", [row])
        assert (f"Expected --align {right}" in caplog.text) == warned


def test_the_tokenizer_is_part_of_what_is_kept(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "data.jsonl").write_text(json.dumps(READY))
    done = sadkern(
        "cache", "import", tmp_path / "data.jsonl", "--format", "axolotl", "--teacher", "t",
        "--tokenizer", tmp_path / "teacher", "--output", tmp_path / "cache",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = Store.open(tmp_path / "cache").identity
    facts = tokenizer_identity(tokenizer)
    assert (found.tokenizer, found.tokens, found.vocab) == (
        facts["tokenizer"], facts["tokens"], facts["tokens"],
    )  # fmt: skip
    example = {"input_ids": [5, 6, 7, 8], "span_ids": [0, 1, 2, 0]}
    teacher = CachedTeacher(tmp_path / "cache")
    teacher.expect([example], tokenizer=tokenizer, temperature=1.0)
    with pytest.raises(IdentityError, match="temperature"):
        teacher.expect([example], tokenizer=tokenizer, temperature=2.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--format", "csv"], "expected distillkit or axolotl"),
        (["--format", "axolotl"], "expected --vocab"),
        (["--format", "axolotl", "--align", "last"], "expected one of next, same"),
        (["--format", "axolotl", "--config", "c.yaml"], "axolotl's have none"),
        (["--format", "distillkit", "--align", "same"], "always"),
        (["--format", "distillkit", "--config", "gone.yaml"], "No such file"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(tmp_path, options, said):
    (tmp_path / "data.jsonl").write_text(json.dumps(READY))
    done = sadkern(
        "cache", "import", tmp_path / "data.jsonl", "--teacher", "t", "--output", tmp_path / "c",
        *options,
    )  # fmt: skip
    assert done.exit_code == 2
    assert said in done.output
    assert not (tmp_path / "c").exists()


def test_files_that_are_packed_in_different_ways_are_refused(capture, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "compression_config.yaml").write_text(yaml.safe_dump({**SMALL, "d": 1024}))
    write_parquet(other / "data.parquet", [small_row()])
    done = sadkern(
        "cache", "import", capture, other / "data.parquet", "--format", "distillkit",
        "--teacher", "t", "--output", tmp_path / "cache",
    )  # fmt: skip
    assert done.exit_code == 2
    assert "expected files that are packed alike" in done.output


def test_without_pyarrow_it_is_said_what_to_install(capture, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    done = sadkern(
        "cache", "import", capture, "--format", "distillkit", "--teacher", "t",
        "--output", tmp_path / "cache",
    )  # fmt: skip
    assert done.exit_code == 2
    assert "expected `pip install 'sadkern[import]'`" in done.output
