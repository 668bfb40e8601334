"""KuaiRand-Pure: 222,444 real impressions of short videos, shipped with the package, split by time.

Gao et al., *KuaiRand: An Unbiased Sequential Recommendation Dataset with Randomly Exposed Videos*, CIKM 2022; CC
BY-SA 4.0 (see ``kuairand_pure/LICENSE.md``).  Eight labels from click (44 %) to hate (0.08 %), play time, 26 user, 7
item and 3 context columns of dense integers, 0 being unknown.
"""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from mtcl_torchrec.data.next_labels import returns_within

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
RETURN_WINDOW_MS = 10 * 60 * 1000


def folder() -> Path:
    """Where the package keeps the data."""
    return Path(str(resources.files("mtcl_torchrec.data") / "kuairand_pure"))


def example_run() -> str:
    """The YAML of the demo: schema, statistics, model and training for this data."""
    return (resources.files("mtcl_torchrec.data") / "kuairand.yaml").read_text(encoding="utf-8")


def load(split: Split) -> pd.DataFrame:
    """One split with every original column, and some derived ones.

    - ``return_10min``: 1.0 where the user's next impression comes within 10 minutes, 0.0 where not, missing where the
      split ends too early to tell or the user is unknown (0 stands for many people).  Looks at this split alone.
    - ``watch_ratio``: play time over duration, at most 1.5; missing where the duration is unknown.
    - ``engaged``: 1 where the user followed, commented or forwarded.
    - ``skipped``: 1 where less than two seconds were played.
    - ``liked_if_clicked``, ``long_view_if_clicked``: the label where the video was clicked, else missing.
    - ``clicked_log_seconds``: log(1 + duration in seconds) of a clicked video, else missing.

    Args:
        split: ``"train"`` (149,732 rows), ``"val"`` (30,290) or ``"test"`` (42,422).

    Raises:
        ValueError: another split.

    Example:
        >>> val = load("val")
        >>> len(val), int(val["is_click"].sum())
        (30290, 13499)
    """
    if split not in SPLITS:
        raise ValueError(f"split is one of {', '.join(SPLITS)}, not {split!r}")
    frame = pq.read_table(folder() / f"{split}.parquet").to_pandas()
    returned = returns_within(frame["user_id"].to_numpy(), frame["time_ms"].to_numpy(), RETURN_WINDOW_MS)
    duration = frame["duration_ms"].to_numpy(dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.minimum(frame["play_time_ms"].to_numpy() / duration, 1.5)
    frame["return_10min"] = np.where(frame["user_id"] == 0, np.nan, returned)
    frame["watch_ratio"] = np.where(duration > 0, ratio, np.nan)
    frame["engaged"] = frame[["is_follow", "is_comment", "is_forward"]].max(axis=1)
    frame["skipped"] = (frame["play_time_ms"] < 2000).astype(np.int8)
    clicked = frame["is_click"] == 1
    frame["liked_if_clicked"] = frame["is_like"].where(clicked)
    frame["long_view_if_clicked"] = frame["long_view"].where(clicked)
    frame["clicked_log_seconds"] = np.log1p(frame["duration_ms"] / 1000).where(clicked)
    return frame


def write(target: Path) -> None:
    """Write the three splits, derived columns included, as Parquet files, with the licence beside them."""
    target.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        load(split).to_parquet(target / f"{split}.parquet", index=False)
    shutil.copy(folder() / "LICENSE.md", target / "LICENSE.md")
