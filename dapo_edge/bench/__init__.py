"""Latency that can be believed: per stage, with percentiles, one frame at a time or at a line's rate."""

from dapo_edge.bench.plan import DEFAULT_SOURCE, BenchPlan
from dapo_edge.bench.run import SCHEMA, bench
from dapo_edge.bench.samples import Samples, percentiles

__all__ = ["DEFAULT_SOURCE", "SCHEMA", "BenchPlan", "Samples", "bench", "percentiles"]
