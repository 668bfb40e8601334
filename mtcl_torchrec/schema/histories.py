"""What a history feature may say, and what it takes from the feature whose values it lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mtcl_torchrec.schema.declared import nearest

if TYPE_CHECKING:
    from mtcl_torchrec.schema.features import Feature

AGE_BUCKETS = 34  # rows of a table of ages: missing, and 33 powers of two, of which the last begins at 136 years
_OF_ANOTHER = ("vocabulary_size", "embedding_dim", "encoding", "min_count", "data_type", "table")
_HISTORY_ALONE = ("of", "beside", "max_length")


def check_history(feature: Feature) -> None:
    """See that a feature says of histories only what belongs to its kind.

    Raises:
        ValueError: naming the feature and the key.
    """
    name, given = feature.name, feature.model_fields_set
    if feature.kind != "history":
        said = next((key for key in _HISTORY_ALONE if key in given), None)
        if said is not None:
            raise ValueError(f"feature {name!r}: {said} belongs to kind: history")
        if feature.encoding == "log_bucket":
            raise ValueError(f"feature {name!r}: encoding 'log_bucket' belongs to the ages beside a history")
        return
    if (feature.of is None) == (feature.beside is None):
        raise ValueError(
            f"feature {name!r}: a history names either 'of', the id feature whose values it lists, or 'beside', the "
            "history whose events it says more of"
        )
    if "pooling" in given:
        raise ValueError(f"feature {name!r}: a history has no pooling; model.sequences says how it becomes one vector")
    if feature.of is not None:
        said = next((key for key in _OF_ANOTHER if key in given), None)
        if said is not None:
            raise ValueError(f"feature {name!r}: a history of {feature.of!r} shares its table and has no {said}")
    if feature.beside is not None and "max_length" in given:
        raise ValueError(f"feature {name!r}: max_length is that of {feature.beside!r}, which it stands beside")
    if feature.encoding == "log_bucket" and "min_count" in given:
        raise ValueError(f"feature {name!r}: encoding 'log_bucket' has no min_count")


def resolved(features: Sequence[Feature]) -> tuple[Feature, ...]:
    """The features, each history with the table and length that it takes from another feature.

    What a feature says itself stays what it says: `model_fields_set` is that of the declaration.

    Raises:
        ValueError: `of` is no id feature, `beside` no history of one, or a bag shares a history's table.
    """
    by_name = {feature.name: feature for feature in features}
    whole = tuple(_resolved(feature, by_name) for feature in features)
    tables = {f.table_name: f.name for f in whole if f.kind == "history"}
    for feature in whole:
        if feature.kind not in ("id", "history", "dense") and feature.table_name in tables:
            raise ValueError(
                f"feature {feature.name!r} is a {feature.kind} and shares table {feature.table_name!r} with history "
                f"{tables[feature.table_name]!r}, which is looked up row by row: give it a table of its own"
            )
    return whole


def _resolved(feature: Feature, by_name: dict[str, Feature]) -> Feature:
    if feature.kind != "history":
        return feature
    taken: dict[str, Any] = {}
    if feature.of is not None:
        ids = [f.name for f in by_name.values() if f.kind == "id"]
        if feature.of not in ids:
            there = f"; it is a {by_name[feature.of].kind}" if feature.of in by_name else nearest(feature.of, ids)
            raise ValueError(f"feature {feature.name!r}: of: no id feature {feature.of!r}{there}")
        one = by_name[feature.of]
        taken = {key: getattr(one, key) for key in _OF_ANOTHER} | {"table": one.table_name}
    else:
        assert feature.beside is not None
        mains = [f.name for f in by_name.values() if f.kind == "history" and f.of is not None]
        if feature.beside not in mains:
            hint = nearest(feature.beside, mains)
            raise ValueError(f"feature {feature.name!r}: beside: no history of an id feature {feature.beside!r}{hint}")
        main = by_name[feature.beside]
        if feature.group != main.group:
            raise ValueError(f"feature {feature.name!r}: group is that of {feature.beside!r}, which it stands beside")
        taken = {"max_length": main.max_length}
        if feature.encoding == "log_bucket" and feature.vocabulary_size is None:
            taken["vocabulary_size"] = AGE_BUCKETS
    values = {key: getattr(feature, key) for key in type(feature).model_fields} | taken
    return type(feature).model_construct(_fields_set=set(feature.model_fields_set), **values)
