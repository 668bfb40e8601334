"""What a model knows of the items that joined its catalogue after training, in a line for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtcl_torchrec.data.catalogue import Catalogue
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.data.source import Rows

NAMED = 3  # items that are named one by one


def said_of_new_items(
    catalogue: Catalogue, preprocessor: Preprocessor, contents: Mapping[str, Any] | None = None
) -> list[str]:
    """Lines that tell of the new items what the model has of them; none where nothing was given.

    Args:
        catalogue: with the new items, see `Catalogue.with_items`.
        preprocessor: that encodes them.
        contents: feature -> file, what was given of newer vectors and codes.

    Example:
        >>> import pandas as pd
        >>> from mtcl_torchrec.schema import Feature, Schema, Task
        >>> features = [Feature(name="item", group="item"), Feature(name="genre", group="item")]
        >>> preprocessor = Preprocessor(Schema(features=features, tasks=[Task.binary("click")]))
        >>> log = pd.DataFrame({"item": ["a"], "genre": ["x"], "click": [1]})
        >>> _ = preprocessor.fit(Rows(log))
        >>> catalogue = Catalogue(pd.DataFrame(), log[["item", "genre"]], {}, pd.DataFrame(), pd.Series(dtype=float))
        >>> more = catalogue.with_items(Rows(pd.DataFrame({"item": ["a", "b", "c"], "genre": ["y", "x", "z"]})))
        >>> for line in said_of_new_items(more, preprocessor):
        ...     print(line)
        2 new items; 1 was in the catalogue already, where the log's columns stay: a
        1 of the new items have a genre that training did not see: it counts as unknown
    """
    if not catalogue.joined and not catalogue.repeated:
        if not contents:
            return []
        given = ", ".join(contents)
        return [f"newer {given}, and no new items to rank: --items names them, with the item's columns of the log"]
    new = Rows(catalogue.items.tail(catalogue.joined).reset_index(drop=True)) if catalogue.joined else None
    lines = [_counted(catalogue, preprocessor.encoder, new)]
    if new is not None:
        lines += _unknown_values(preprocessor.encoder, new)
        lacking = [name for name, count in _with_content(preprocessor.encoder, new).items() if not count]
        if lacking:
            options = " ".join(f"--contents {name}=FILE" for name in lacking)
            lines.append(f"the model reads {' and '.join(lacking)}, which no new item has: {options} gives newer ones")
    return lines


def _counted(catalogue: Catalogue, encoder: FeatureEncoder, new: Rows | None) -> str:
    """How many there are, with what, and how many were known."""
    said = f"{catalogue.joined:,} new item{'' if catalogue.joined == 1 else 's'}"
    if new is not None and (found := _with_content(encoder, new)):
        said += ": " + ", ".join(f"{count:,} with {name}" for name, count in found.items())
    if known := len(catalogue.repeated):
        named = ", ".join(map(str, catalogue.repeated[:NAMED])) + (", …" if known > NAMED else "")
        was = "was" if known == 1 else "were"
        said += f"; {known:,} {was} in the catalogue already, where the log's columns stay: {named}"
    return said


def _with_content(encoder: FeatureEncoder, new: Rows) -> dict[str, int]:
    """Content feature of the item -> how many of the rows have a vector or a code."""
    names = [f.name for f in encoder.schema.features if f.has_content and f.rows_from in new.frame]
    if not names:
        return {}
    part = encoder.only(names)
    covered = part.coverage(part.encode(new, with_labels=False))
    return {feature.name: round(share * len(new)) for feature, share in covered}


def _unknown_values(encoder: FeatureEncoder, new: Rows) -> list[str]:
    """A line for each column of the item whose values are not all in its vocabulary; the key's are new by nature."""
    key = new.frame.columns[0]
    lines = []
    for feature in encoder.schema.features:
        column = feature.rows_from
        if feature.kind != "id" or not feature.learns_values or column == key or column not in new.frame:
            continue
        rows = encoder.only([feature.name]).encode(new, with_labels=False)
        there = new.frame[column].notna().to_numpy(dtype=bool)
        unknown = int(((rows.ids[:, 0].numpy() == 0) & there).sum())
        if unknown:
            lines.append(
                f"{unknown:,} of the new items have a {column} that training did not see: it counts as unknown"
            )
    return lines
