"""The store gives back what was written, byte for byte or within its stated error, or says so."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import small_tokenizer
from small_tokenizers import byte_level

from sadkern.files import BusyError
from sadkern.store import (
    DamagedError,
    Identity,
    IdentityError,
    Store,
    content_key,
    directory,
    tokenizer_identity,
)
from sadkern.store.care import drop_damaged, merge, verify
from sadkern.store.codec import (
    LOWEST,
    STEPS,
    bytes_per_row,
    decode_hidden,
    decode_topk,
    encode_hidden,
    encode_topk,
    high_bits,
    take,
)

# The sizes at which an id's upper bits change, and those of LLaMA, Qwen and Gemma.
VOCABULARIES = [2, 300, 32000, 65535, 65536, 151936, 262143, 262144, 262208, 1 << 20]
IDENTITY = Identity("topk", k=4, temperature=1.0, vocab=300, teacher="t", revision="r")


def rows_of(rng, rows, k, vocab, spread=4.0, ragged=False):
    """ids, logprobs, tail mass, entropy of rows as a teacher gives them."""
    logits = np.sort(rng.normal(size=(rows, k)) * spread)[:, ::-1]
    tail = rng.random(rows) ** 4
    logprobs = logits - np.logaddexp.reduce(logits, -1, keepdims=True) + np.log1p(-tail)[:, None]
    ids = rng.integers(0, vocab, (rows, k)).astype(np.int32)
    if ragged:
        absent = np.arange(k) >= rng.integers(0, k + 1, rows)[:, None]
        ids[absent], logprobs[absent] = -1, -np.inf
        tail = 1 - np.exp(logprobs).sum(-1)
    return ids, logprobs, tail, rng.random(rows) * 5


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_ids_come_back_and_logprobs_to_the_stated_error(vocab, ragged):
    rng = np.random.default_rng(vocab)
    ids, logprobs, tail, entropy = rows_of(rng, 40, 9, vocab, ragged=ragged)
    ids[0, 0], ids[1, 0] = vocab - 1, 0
    ids[2] = -1  # a row without any entry
    logprobs[2], tail[2] = -np.inf, 1
    columns = encode_topk(ids, logprobs, tail, entropy, vocab)
    found_ids, found, found_tail = decode_topk(columns, vocab)
    width = found_ids.shape[1]
    assert np.array_equal(found_ids, ids[:, :width])
    assert (ids[:, width:] == -1).all()
    np.testing.assert_allclose(columns["entropy"], entropy, rtol=1e-7)
    # Half a step of each, and what a common shift by the mean of such errors adds.
    there = np.isfinite(found)
    assert np.array_equal(there, np.isfinite(logprobs[:, :width]))
    x = np.where(there, logprobs[:, :width], 0)
    bound = np.sqrt(1 + x**2) / (2 * STEPS)
    shift = np.max(bound, -1, keepdims=True)
    assert (np.abs(np.where(there, found, 0) - x) <= bound + shift + 1e-6).all()
    mass = np.exp(found.astype(np.float64)).sum(-1) + found_tail
    np.testing.assert_allclose(mass, 1, atol=1e-6)
    np.testing.assert_allclose(found_tail, tail, atol=2e-4)


def test_what_a_float16_cannot_say_and_what_lies_at_the_ends():
    """-inf stays -inf, the lowest is float16's, and near 0 nothing is lost."""
    logprobs = np.array([[-1e-7, -20.0, -np.inf, -1e9]])
    ids = np.array([[3, 1, 2, 0]], np.int32)
    columns = encode_topk(ids, logprobs, np.zeros(1), np.zeros(1), 9)
    found_ids, found, _ = decode_topk(columns, 9)
    assert found_ids.tolist() == [[3, 1, 2, 0]]
    assert abs(found[0, 0]) < 1e-7
    assert found[0, 1] == pytest.approx(-20, rel=1e-4)
    assert found[0, 2] == -np.inf
    assert found[0, 3] == pytest.approx(LOWEST, rel=1e-6)


def test_an_entry_is_told_more_finely_than_by_a_float16_of_the_same_size():
    logprobs = np.random.default_rng(0).uniform(-30, -7, (2000, 1))
    ids, none = np.zeros((2000, 1), np.int32), np.zeros(2000)
    columns = encode_topk(ids, logprobs, none + 1, none, 9)
    error = np.abs(decode_topk(columns, 9)[1] - logprobs)
    halves = np.abs(logprobs.astype(np.float16).astype(np.float64) - logprobs)
    assert error.max() < halves.max() / 2.5
    assert error.mean() < halves.mean() / 2.5


@pytest.mark.parametrize(("vocab", "entry"), [(32000, 4.0), (151936, 4.25), (262208, 4.5)])
def test_bytes_of_an_entry_and_of_a_row(vocab, entry):
    rng = np.random.default_rng(0)
    columns = encode_topk(*rows_of(rng, 100, 64, vocab), vocab)
    size = sum(column.nbytes for column in columns.values())
    assert size == 100 * (64 * entry + 2 + 4 + 4)  # count, tail mass, entropy
    # Position and the actual token's log-probability beside it.
    assert bytes_per_row(64, vocab) == 64 * entry + 18
    assert bytes_per_row(64, vocab) / 64 < 5
    assert bytes_per_row(5120, vocab, hidden=True) == 10256


def test_what_is_no_row_is_refused_by_its_number():
    ids, logprobs, tail, entropy = rows_of(np.random.default_rng(0), 4, 3, 9)
    wrong = ids.copy()
    wrong[2, 1] = 9
    with pytest.raises(ValueError, match="row 2 of 4 has an id of 9 or more"):
        encode_topk(wrong, logprobs, tail, entropy, 9)
    logprobs[3, 0] = np.nan
    with pytest.raises(ValueError, match="row 3 of 4 has a log-probability that is NaN"):
        encode_topk(ids, logprobs, tail, entropy, 9)
    with pytest.raises(ValueError, match="row 1 of 2 has a hidden state that is not finite"):
        encode_hidden(np.array([[1.0, 2.0], [np.inf, 0.0]]))
    with pytest.raises(ValueError, match="a vocabulary of 16777216: expected less than"):
        high_bits(1 << 24)


def test_hidden_states_of_bfloat16_come_back_exactly_whatever_their_size():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(50, 64)).astype(np.float32)
    values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)  # as bfloat16 has them
    values = np.ldexp(values, rng.integers(-40, 40, (50, 1)))
    values[7] = 0
    found = decode_hidden(encode_hidden(values))
    # A float16 of the row's scale keeps 8 bits down to 2^-17 of its largest.
    small = np.abs(values) < np.abs(values).max(-1, keepdims=True) * 2.0**-16
    assert np.array_equal(np.where(small, 0, found), np.where(small, 0, values))
    assert (np.abs(found - values) <= np.abs(values).max(-1, keepdims=True) * 2.0**-24).all()


@pytest.mark.parametrize("vocab", [300, 151936, 262208])
def test_rows_that_are_taken_are_those_rows(vocab):
    rng = np.random.default_rng(0)
    ids, logprobs, tail, entropy = rows_of(rng, 12, 5, vocab, ragged=True)
    kept = rng.random(12) < 0.5
    some = take(encode_topk(ids, logprobs, tail, entropy, vocab), kept, vocab)
    expected = encode_topk(ids[kept], logprobs[kept], tail[kept], entropy[kept], vocab)
    assert some.keys() == expected.keys()
    for name, column in expected.items():
        assert np.array_equal(some[name], column), name
    values = rng.normal(size=(12, 3))
    some = take(encode_hidden(values), kept, vocab)
    assert np.array_equal(decode_hidden(some), decode_hidden(encode_hidden(values[kept])))


@given(st.lists(st.integers(0, 2**31 - 1), max_size=20), st.lists(st.integers(0, 9), max_size=3))
def test_a_key_is_of_the_tokens_whatever_holds_them(tokens, more):
    key = content_key(tokens)
    assert key == content_key(np.array(tokens, np.int32)) == content_key(tuple(tokens))
    assert (content_key([*tokens, *more]) == key) == (not more)


# A store of a few trajectories.


def record(seed, rows=3):
    rng = np.random.default_rng(seed)
    columns = {"position": np.arange(rows, dtype=np.int32)}
    columns |= encode_topk(*rows_of(rng, rows, 4, 300), 300)
    return content_key([seed, 7]), columns


def filled(path, seeds, per_shard=2):
    store = Store.create(path, IDENTITY)
    for begin in range(0, len(seeds), per_shard):
        with store.writer(f"shard{seeds[begin]}") as writer:
            for seed in seeds[begin : begin + per_shard]:
                writer.add([record(seed)])
            writer.seal()
    return store


def assert_holds(store, seeds):
    assert set(store) == {record(seed)[0] for seed in seeds}
    for seed in seeds:
        key, columns = record(seed)
        found = store.read(key)
        assert found.keys() == columns.keys()
        for name, column in columns.items():
            assert np.array_equal(found[name], column), name


def test_what_is_written_can_be_read(tmp_path):
    store = filled(tmp_path, range(5))
    assert_holds(store, range(5))
    assert_holds(Store.open(tmp_path), range(5))
    assert verify(tmp_path) == []
    assert not store.leftovers()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lock", "manifest.json", "shards"]


def test_a_file_is_little_more_than_its_rows(tmp_path):
    """What the documentation says of K = 64 and Qwen's vocabulary: 290 bytes a supervised token."""
    rng = np.random.default_rng(0)
    store = Store.create(tmp_path, Identity("topk", k=64, temperature=1.0, vocab=151936))
    records = []
    for seed in range(20):
        columns = encode_topk(*rows_of(rng, 300, 64, 151936), 151936)
        columns["position"] = np.arange(300, dtype=np.int32)
        columns["label_logprob"] = np.zeros(300, np.float32)
        records.append((content_key([seed]), columns))
    with store.writer("a") as writer:
        writer.add(records)
        writer.seal()
    (facts,) = store.manifest["shards"].values()
    assert facts["rows"] == 6000
    assert 290 <= facts["bytes"] / facts["rows"] < 290.7
    assert facts["bytes"] / facts["rows"] / 64 < 5


def test_a_flipped_bit_anywhere_is_found_and_its_file_named(tmp_path):
    filled(tmp_path, range(4))
    rng = np.random.default_rng(0)
    files = [tmp_path / "manifest.json", *sorted((tmp_path / "shards").iterdir())]
    assert len(files) == 3
    for file in files:
        whole = file.read_bytes()
        places = range(len(whole)) if file.suffix == ".json" else rng.integers(0, len(whole), 150)
        for place in [*places, 0, 8, 40, len(whole) - 1]:
            damaged = bytearray(whole)
            damaged[place] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            (fault,) = verify(tmp_path)
            assert str(file) in fault
            assert "damaged" in fault
            # And no reading gives anything else than what was written.
            refusal = ""
            try:
                assert_holds(Store.open(tmp_path), range(4))
            except DamagedError as error:
                refusal = str(error)
            assert not refusal or str(file) in refusal
        file.write_bytes(whole)
    assert verify(tmp_path) == []


@pytest.mark.parametrize("left", [0, 1, 7, 100, -1])
def test_a_truncated_or_lost_file_is_named(tmp_path, left):
    filled(tmp_path, range(4))
    file = sorted((tmp_path / "shards").iterdir())[1]
    whole = file.read_bytes()
    file.write_bytes(whole[:left])
    for call in (Store.open, lambda path: verify(path)[0]):
        try:
            said = str(call(tmp_path))
        except DamagedError as error:
            said = str(error)
        assert str(file) in said
        assert "damaged" in said
    file.unlink()
    with pytest.raises(DamagedError, match=file.name):
        Store.open(tmp_path)
    assert file.name in verify(tmp_path)[0]
    # Set aside, the rest can be read, and what was lost is written again.
    assert drop_damaged(tmp_path) == [file.name]
    store = Store.open(tmp_path)
    assert len(store) == 2
    missing = [seed for seed in range(4) if record(seed)[0] not in store]
    filled(tmp_path, missing)
    assert_holds(Store.open(tmp_path), range(4))


def test_a_file_that_no_one_listed_is_told(tmp_path):
    filled(tmp_path, range(2))
    (tmp_path / "shards" / "stray.safetensors").write_bytes(b"x")
    (fault,) = verify(tmp_path)
    assert "stray.safetensors is not listed" in fault
    assert_holds(Store.open(tmp_path), range(2))


def test_another_schema_or_no_store_is_told(tmp_path):
    filled(tmp_path, [0])
    with pytest.raises(FileNotFoundError, match=r"is no cache.*expected the --output of"):
        Store.open(tmp_path / "shards")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest.pop("checksum")
    (tmp_path / "manifest.json").write_bytes(directory._manifest_text({**manifest, "schema": 2}))
    with pytest.raises(ValueError, match="is of schema 2: expected 1"):
        Store.open(tmp_path)


def test_parts_outlive_their_writer_and_one_process_has_a_name_at_a_time(tmp_path):
    store = Store.create(tmp_path, IDENTITY)
    with store.writer("a") as writer:
        writer.add([record(0), record(1)])
        with pytest.raises(BusyError, match="is being written by another process"):
            store.writer("a")
    assert len(Store.open(tmp_path)) == 0
    assert_holds(Store.open(tmp_path, parts=True), range(2))
    part = next((tmp_path / "parts" / "a").glob("*.safetensors"))
    with store.writer("a") as writer:
        assert set(writer.parts) == {record(0)[0], record(1)[0]}
        writer.add([record(2)])
    # What is damaged among the parts is dropped, the others are kept.
    part.write_bytes(part.read_bytes()[:-1] + b"\x00")
    with store.writer("a") as writer:
        assert set(writer.parts) == {record(2)[0]}
        writer.seal()
    assert_holds(Store.open(tmp_path), [2])
    with store.writer("a") as writer, pytest.raises(ValueError, match="a is sealed already"):
        writer.add([record(3)])


def test_one_may_begin_while_another_clears_away(tmp_path):
    """The last to seal takes `parts` with it, which the next to begin has just made sure of."""
    Store.create(tmp_path, IDENTITY)

    def write(name):
        store, sealed = Store.open(tmp_path), 0
        for number in range(60):
            with suppress(BusyError), store.writer(f"{name}{number}") as writer:
                writer.discard()
                sealed += 1
        return sealed

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(write, "abcd")) == [60] * 4  # each its own names
        assert sum(pool.map(write, "eeee")) >= 60  # each name by one at least
    assert not (tmp_path / "parts").exists()


def test_of_two_records_of_a_trajectory_the_one_with_more_rows_counts(tmp_path):
    store = Store.create(tmp_path, IDENTITY)
    for name, rows in (("a", 3), ("b", 5), ("c", 4)):
        with store.writer(name) as writer:
            writer.add([record(0, rows)])
            writer.seal()
    for opened in (store, Store.open(tmp_path)):
        assert len(opened) == 1
        assert opened.rows(record(0)[0]) == 5
    merged = merge([tmp_path], tmp_path / "merged")
    assert merged.rows(record(0)[0]) == 5
    (facts,) = merged.manifest["shards"].values()
    assert facts["rows"] == 5
    assert facts["trajectories"] == 1


def test_merging_keeps_each_once_in_even_files_and_can_be_repeated(tmp_path):
    filled(tmp_path / "a", range(6), per_shard=1)
    filled(tmp_path / "b", range(4, 9))
    merged = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c", shard_bytes=300)
    assert_holds(merged, range(9))
    counts = [shard["trajectories"] for shard in merged.manifest["shards"].values()]
    assert sum(counts) == 9
    assert len(counts) < 8
    before = {p.name: p.read_bytes() for p in (tmp_path / "c" / "shards").iterdir()}
    again = merge([tmp_path / "b", tmp_path / "a"], tmp_path / "c", shard_bytes=300)
    assert {p.name: p.read_bytes() for p in (tmp_path / "c" / "shards").iterdir()} == before
    assert_holds(again, range(9))
    Store.create(tmp_path / "d", replace(IDENTITY, temperature=2.0))
    with pytest.raises(IdentityError, match=r"temperature is 1\.0 there and 2\.0 here"):
        merge([tmp_path / "a", tmp_path / "d"], tmp_path / "e")


def test_merging_clears_away_what_an_interrupted_one_left_and_nothing_of_one_that_lives(tmp_path):
    filled(tmp_path / "a", range(3))
    merged = Store.create(tmp_path / "b", IDENTITY)
    with merged.writer("merge-killed") as killed:
        killed.add([record(7)])
    with merged.writer("merge-lives") as lives:
        lives.add([record(8)])
        assert_holds(merge([tmp_path / "a"], tmp_path / "b"), range(3))
        assert merged.leftovers() == ["merge-lives"]
        lives.seal()
    assert_holds(Store.open(tmp_path / "b"), [0, 1, 2, 8])


def with_head(path, seed, data):
    store = Store.create(path, Identity("hidden", k=None, temperature=None, vocab=9))
    with store.writer(f"shard{seed}") as writer:
        columns = encode_hidden(np.eye(3)) | {"position": np.arange(3, dtype=np.int32)}
        writer.add([(content_key([seed]), columns)])
        writer.seal()
    if data:
        store.keep_head(data, {"scale": 2.0})
    return store


def test_merging_hidden_states_brings_their_head_from_whichever_has_it(tmp_path):
    with_head(tmp_path / "a", 0, None)
    with_head(tmp_path / "b", 1, b"the head")
    merged = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    head = merged.manifest["head"]
    assert head["scale"] == 2.0
    assert (tmp_path / "c" / head["file"]).read_bytes() == b"the head"
    assert set(merged) == {content_key([0]), content_key([1])}
    assert verify(tmp_path / "c") == []
    (tmp_path / "c" / head["file"]).write_bytes(b"the hear")
    (fault,) = verify(tmp_path / "c")
    assert f"{tmp_path / 'c' / head['file']} is damaged" in fault
    with pytest.raises(DamagedError, match=head["file"]):
        merge([tmp_path / "c"], tmp_path / "d")


def test_merging_into_a_source_leaves_its_head_as_it_is(tmp_path):
    first = with_head(tmp_path / "a", 0, b"the head")
    with_head(tmp_path / "b", 1, b"the head")
    file = tmp_path / "a" / first.manifest["head"]["file"]
    before = file.stat()
    merged = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "a")
    assert set(merged) == {content_key([0]), content_key([1])}
    assert file.stat().st_ino == before.st_ino  # who has it mapped goes on reading it
    assert file.read_bytes() == b"the head"
    assert verify(tmp_path / "a") == []


def test_of_several_that_put_a_head_there_one_does(tmp_path, monkeypatch):
    store, written = with_head(tmp_path, 0, None), []
    original = directory.write_whole
    monkeypatch.setattr(
        directory, "write_whole", lambda path, data: written.append(path) or original(path, data)
    )
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(
            lambda _: Store.open(tmp_path).keep_head(b"it", {"scale": 1.0}), range(8)
        ):
            pass
    assert [path.name.split("-")[0] for path in written].count("head") == 1
    store.refresh()
    assert (tmp_path / store.manifest["head"]["file"]).read_bytes() == b"it"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temperature": 2.0}, r"temperature is 1\.0 there and 2\.0 here"),
        ({"k": 5}, "k is 4 there and 5 here"),
        ({"mode": "sampled"}, "mode is topk there and sampled here"),
        ({"vocab": 301}, "the vocabulary's size is 300 there and 301 here"),
        ({"revision": "s"}, "the teacher's revision .* is r there and s here"),
        ({"revision": None, "teacher": "u"}, "teacher is t there and u here"),
    ],
)
def test_another_signal_is_refused_with_what_differs(tmp_path, change, said):
    Store.create(tmp_path, IDENTITY)
    with pytest.raises(IdentityError, match=said):
        Store.create(tmp_path, replace(IDENTITY, **change))
    # Of equal weights the name does not matter, as a folder may move.
    Store.create(tmp_path, replace(IDENTITY, teacher="elsewhere/t"))


def test_a_tokenizer_is_its_tokens_and_its_template():
    tokenizer = small_tokenizer()
    found = tokenizer_identity(tokenizer)
    assert found == tokenizer_identity(small_tokenizer())
    assert found["tokens"] == len(tokenizer)
    assert found["tokenizer"] != tokenizer_identity(byte_level())["tokenizer"]
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_identity(tokenizer)["template"] != found["template"]
    # A token that is added later changes nothing of the others.
    tokenizer.add_tokens(["<later>"])
    assert tokenizer_identity(tokenizer)["tokenizer"] != found["tokenizer"]
    assert tokenizer_identity(tokenizer, found["tokens"])["tokenizer"] == found["tokenizer"]
