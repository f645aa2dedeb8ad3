"""The benchmark of a cache: what it leaves behind."""

from __future__ import annotations

from bench import bench_cache, common


def test_results_are_kept_only_where_that_is_asked_for(tmp_path, monkeypatch, benchmark):
    """As the other benchmarks': by bench/conftest.py, with `--record`."""
    small = {"V": 500, "K": 8, "TRAJECTORIES": 16, "ROWS": 6, "PER_SHARD": 8, "BATCH": 4}
    for name, size in small.items():
        monkeypatch.setattr(bench_cache, name, size)
    kept = tmp_path / "bench" / "results"
    kept.mkdir(parents=True)
    monkeypatch.setattr(common, "ROOT", tmp_path)
    bench_cache.test_reading_in_order_and_shuffled(tmp_path / "cache", benchmark)
    assert list(kept.iterdir()) == []
