"""What is chosen on the command line and in no YAML; here, so that the command line knows it without loading torch."""

from __future__ import annotations

from typing import Literal

WorldName = Literal["shop", "social", "video", "courses", "health"]  # of mtcl init and synth
WORLD_SIZE = 100_000  # users, and items
Device = Literal["auto", "cpu", "cuda"]
Pruner = Literal["median", "hyperband", "none"]  # of mtcl tune
Search = Literal["auto", "tpe", "cma", "none"]  # of mtcl fuse
TablePrecision = Literal["fp32", "fp16", "int8"]  # of mtcl export
Compile = Literal["auto", "yes", "no"]

USUAL_COMBINERS = ("weighted_mean", "weighted_geometric_mean", "stacking")  # that mtcl fuse tries
SESSION_MINUTES = 0.0  # between rows of a user that are one request, where none is named; 0: all, as reports have it
DRAWS = 400  # of users; the standard error of a standard error is then 1 / √(2 · 400), 3.5 %
BASELINE_ROWS = 2_000_000  # that baselines other than networks learn from
MOVIELENS = "https://grouplens.org/datasets/movielens/1m/"  # whence a person has what mtcl demo --text reads
MAX_CHARS = 8192  # of an item's text
