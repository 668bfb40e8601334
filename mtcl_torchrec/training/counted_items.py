"""How popular items are in rows that are streamed or generated: counted in the first epoch, kept with the run.

Each rank counts the rows that it trains on; a checkpoint on the way holds what each has counted, and the sums are added
up when the epoch is over.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.data.item_totals import ItemTotals
from mtcl_torchrec.data.popularity import Popularity
from mtcl_torchrec.data.splits import Splits
from mtcl_torchrec.data.stream import StreamRows
from mtcl_torchrec.schema import Schema, Task
from mtcl_torchrec.training.checkpoint.state import counts_items
from mtcl_torchrec.training.directory import POPULARITY, readable_folder, replace_folder
from mtcl_torchrec.training.sharding import Ranks
from mtcl_torchrec.training.start import Start

_ROWS = "training_rows.json"  # the fingerprint of what was counted

Say = Callable[[str], None]


def totals_of(
    folder: Path,
    splits: Splits,
    encoder: FeatureEncoder,
    tasks: Sequence[Task],
    start: Start,
    *,
    resume: bool,
    say: Say,
) -> ItemTotals | None:
    """Where items are counted in the epoch to come; None where they were, or need not or cannot be.

    Args:
        folder: the run directory.
        start: where training starts.
        resume: whether what the folder holds is of this run.
    """
    feature = counted_feature(encoder.schema)
    if not isinstance(splits.train, StreamRows) or feature is None:
        return None
    if resume and _counted_rows(folder) == splits.train.fingerprint:
        return None
    if start.position.taken and not (start.checkpoint is not None and counts_items(start.checkpoint)):
        say("items were not counted when this epoch began: the fused score is held against no popularity")
        return None
    rows = encoder.num_rows(next(f for f in encoder.schema.sparse_features if f.name == feature))
    totals = ItemTotals(tasks, feature, rows)
    if totals.counts < rows:
        say(f"popularity: {rows - 1:,} items are counted in {totals.counts - 1:,} groups, those of a group together")
    return totals


def counted_feature(schema: Schema) -> str | None:
    """The feature whose rows tell items apart: an id, or else a vector; None where there is none.

    Example:
        >>> from mtcl_torchrec.schema import Feature
        >>> id_of_item = Feature(name="shown", column="sku", group="item")
        >>> counted_feature(Schema(features=[id_of_item], tasks=[Task.binary("click")], item="sku"))
        'shown'
    """
    of_item = [f for f in schema.sparse_features if schema.item is not None and f.rows_from == schema.item]
    kinds = [f.name for kind in ("id", "vector") for f in of_item if f.kind == kind]
    return next(iter(kinds), None)


def keep_popularity(totals: ItemTotals, folder: Path, fingerprint: str, where: Ranks) -> None:
    """Add up what all ranks have counted, and write what follows; every rank calls it.

    Args:
        fingerprint: of the training rows.
    """
    for tensor in totals.tensors().values():
        if where.world_size > 1:
            added = tensor.to(where.device)
            dist.all_reduce(added)
            tensor.copy_(added)

    def write(to: Path) -> None:
        to.mkdir(parents=True, exist_ok=True)
        totals.popularity().save(to)
        (to / _ROWS).write_text(json.dumps(fingerprint))

    if where.first:
        replace_folder(folder / POPULARITY, write)
    where.barrier()


def counted_popularity(folder: Path) -> Popularity | None:
    """What `keep_popularity` wrote into a run directory; None where it wrote nothing."""
    there = readable_folder(folder / POPULARITY)
    return Popularity.load(there) if there.is_dir() else None


def _counted_rows(folder: Path) -> str | None:
    path = readable_folder(folder / POPULARITY) / _ROWS
    return json.loads(path.read_text()) if path.is_file() else None
