"""Benchmarks: one file per question asked, `common` for how it is asked."""
