"""What is learnt of a schema's columns from the training split, and stored with the model: vocabularies, scales."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd

from mtcl_torchrec.data.contents import CodeRows, Contents, VectorRows, read_contents
from mtcl_torchrec.data.fitting import SplitSummary, summarise
from mtcl_torchrec.data.parquet import ParquetFiles
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.data.vocabulary import grow_vocabulary
from mtcl_torchrec.schema import ConfigError, DataError, Feature, Group, Schema, Task, nearest


class Learnt:
    """What is learnt of a schema's columns; `mtcl_torchrec.data.encoding.FeatureEncoder` encodes rows by it.

    Example:
        >>> schema = Schema(features=[Feature(name="city", group="user")], tasks=[Task.binary("click")])
        >>> learnt = Learnt(schema).fit(Rows(pd.DataFrame({"city": ["Rome", "Oslo", "Rome"], "click": [0, 1, 1]})))
        >>> learnt.num_embeddings("city")
        3
    """

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self._vocabularies: dict[str, pd.Index] = {}
        self._dense: dict[str, tuple[float, float, bool]] = {}
        self._label_scale: dict[str, tuple[float, float]] = {}
        self._contents: dict[str, Contents] = {}

    # ------------------------------------------------------------------ what the model needs to know

    @property
    def keys(self) -> tuple[str, ...]:
        """The sparse features in the order of the KeyedJaggedTensor: table by table, then those without one."""
        of_tables = [f.name for features in self.schema.tables().values() for f in features]
        return (*of_tables, *(f.name for f in self.schema.sparse_features if not f.has_table))

    def num_embeddings(self, table: str) -> int:
        """Rows of an embedding table, row 0 included."""
        return self._table_size(self.schema.tables()[table][0])

    def _table_size(self, feature: Feature) -> int:
        """Rows of the table of a feature; features that share one agree on what it is found by."""
        table = feature.table_name
        if table in self._vocabularies and feature.vocabulary_size is None:
            return len(self._vocabularies[table]) + 1
        if feature.name in self._contents and feature.vocabulary_size is None:
            return len(self._contents[feature.name]) + 1
        assert feature.vocabulary_size is not None
        return feature.vocabulary_size

    def num_rows(self, feature: Feature) -> int:
        """How many values a sparse feature may have in a batch, 0 included: rows of its table, or of its vectors."""
        if feature.name in self._contents:
            return len(self._contents[feature.name]) + 1
        return self.num_embeddings(feature.table_name)

    def vectors(self, name: str) -> np.ndarray:
        """(V + 1, d) float32 or float16: the frozen vectors of a vector feature, row 0 zero.

        Raises:
            ConfigError: the encoder is that of an exported model, whose network has them.
        """
        rows = self._contents[name]
        if not isinstance(rows, VectorRows) or rows.vectors is None:
            raise ConfigError(f"feature {name!r}: its vectors are part of the exported network")
        return rows.vectors

    @property
    def dense_groups(self) -> tuple[tuple[Group, ...], ...]:
        """The groups of each dense column."""
        groups: list[tuple[Group, ...]] = []
        for feature in self.schema.dense_features:
            groups += [feature.group] * (2 if self._dense[feature.name][2] else 1)
        return tuple(groups)

    def resolved_tasks(self) -> tuple[Task, ...]:
        """The schema's tasks; regression tasks with the mean and spread of their training labels, multiclass tasks with
        their number of classes, a sampled softmax with the feature that tells items apart.

        Raises:
            DataError: the training split holds none of a multiclass task's classes.
        """
        tasks = []
        features = {f.name: f for f in self.schema.sparse_features}
        for task in self.schema.tasks:
            if task.kind == "multiclass" and task.num_classes is None:
                assert task.item_class is not None
                rows = self.num_embeddings(features[task.item_class].table_name)
                if rows < 2:
                    raise DataError(f"task {task.name!r}: column {task.item_class!r} holds no class at all")
                task = task.model_copy(update={"num_classes": rows})
            if task.name in self._label_scale:
                mean, std = self._label_scale[task.name]
                task = task.model_copy(update={"mean": mean, "std": std})
            softmax = task.head.sampled_softmax
            if softmax is not None and softmax.item is None:
                named = softmax.model_copy(update={"item": self.schema.item_feature})
                task = task.model_copy(update={"head": task.head.model_copy(update={"sampled_softmax": named})})
            tasks.append(task)
        return tuple(tasks)

    def dense_scale(self, name: str) -> tuple[int, float, float]:
        """The column of a dense feature in `EncodedRows.dense`, and the mean and standard deviation of its transformed
        values, which were taken off.

        Raises:
            KeyError: there is no such dense feature.
        """
        column = 0
        for feature in self.schema.dense_features:
            mean, std, marks_missing = self._dense[feature.name]
            if feature.name == name:
                return column, mean, std
            column += 2 if marks_missing else 1
        raise KeyError(name)

    # ------------------------------------------------------------------ learning from the training split

    def fit(self, rows: Rows, *, grown_from: Learnt | None = None) -> Self:
        """Learn vocabularies and scales from the training split in memory; see `learn`.

        Raises:
            DataError: a vocabulary is larger than its table, or a column does not hold what the schema says.
        """
        summary = self.summary(grown_from=grown_from)
        summary.add(rows)
        return self.learn(summary, rows.name, grown_from=grown_from)

    def fit_stream(
        self,
        files: ParquetFiles,
        *,
        workers: int = 1,
        grown_from: Learnt | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Self:
        """Learn the same from files in one pass, in memory for the vocabularies and some windows; see `learn`.

        In a process group every rank calls this, reads its part, and learns the whole.  Only columns from which there
        is something to learn are decoded.

        Args:
            workers: threads that read ahead.
            progress: called with the share of this rank's part that is read.

        Raises:
            DataError: as `fit`, on every rank.
        """
        summary = self.summary(grown_from=grown_from)
        summary = summarise(summary, files.only(summary.columns()), workers, progress)
        return self.learn(summary, files.name, grown_from=grown_from)

    def summary(self, *, grown_from: Learnt | None = None) -> SplitSummary:
        """An empty summary of what there is to learn."""
        known = grown_from._dense if grown_from is not None else {}
        return SplitSummary(self.schema, [f for f in self.schema.dense_features if f.name not in known])

    def learn(self, summary: SplitSummary, name: str, *, grown_from: Learnt | None = None) -> Self:
        """Take vocabularies and scales from a summary of the training split.

        Args:
            summary: from `summary`, of all rows.
            name: of the training split, for messages.
            grown_from: an encoder whose model goes on training on new data.  Its values keep their rows and its scales
                stay; values that it does not know get the next free rows, and tables without a declared
                `vocabulary_size` become larger.  So does a multiclass head whose classes are such a table's rows.

        Raises:
            ConfigError: a feature means something else than in `grown_from`.
            DataError: a vocabulary is larger than its table, or a column holds no value at all.
        """
        summary.check(name)
        old = grown_from if grown_from is not None else Learnt(self.schema)
        _refuse_other_meaning(old.schema, self.schema)
        for table, features in self.schema.tables().items():
            if features[0].learns_values:
                known = old._vocabularies.get(table, pd.Index([]))
                counts = [summary.counts[f.name] for f in features if f.of is None]
                self._vocabularies[table] = grow_vocabulary(known, counts, features[0].min_count)
                self._refuse_overflow(table, features[0])
        self._contents = self._read_contents(old)
        for feature in self.schema.dense_features:
            if feature.name in old._dense:
                self._dense[feature.name] = old._dense[feature.name]
            else:
                moments = summary.dense[feature.name]
                self._dense[feature.name] = (*moments.scale(), feature.mark_missing and moments.missing > 0)
        for task in self.schema.tasks:
            if task.kind == "regression":
                mean, std = old._label_scale.get(task.name) or summary.labels[task.name].scale()
                self._label_scale[task.name] = (
                    task.mean if task.mean is not None else mean,
                    task.std if task.std is not None else std,
                )
        return self

    def _read_contents(self, old: Learnt) -> dict[str, Contents]:
        """What the files of items hold, those of one file once; what `old` knows keeps its rows."""
        of_file: dict[tuple[str | None, ...], Contents] = {}
        found: dict[str, Contents] = {}
        for feature in (f for f in self.schema.features if f.has_content):
            file = (feature.kind, feature.vectors, feature.codes, feature.rows_from, feature.data_type)
            contents = of_file[file] if file in of_file else read_contents(feature)
            found[feature.name] = of_file[file] = contents
            if feature.name in old._contents:
                found[feature.name] = old._contents[feature.name].grown(contents, feature.name)  # type: ignore[arg-type]
        return found

    def with_contents(self, files: Mapping[str, str | Path]) -> Self:
        """An encoder that knows the items of newer files, too, for a model that is not trained on.

        New vectors go through the projection as all do.  A new code is looked up by the prefixes that have a row.

        Args:
            files: feature -> vectors or codes file, in which known items have what they had.

        Raises:
            ConfigError: no such feature or file, or a known item has something else now.
            DataError: a file does not hold what it should.
        """
        newer = self.only([f.name for f in self.schema.features])
        newer._contents = dict(self._contents)
        features = {f.name: f for f in self.schema.features if f.has_content}
        for name, path in files.items():
            if name not in features:
                raise ConfigError(f"no vector or semantic_id feature {name!r}{nearest(name, features)}")
            field = "vectors" if features[name].kind == "vector" else "codes"
            read, known = read_contents(features[name].model_copy(update={field: str(path)})), self._contents[name]
            if isinstance(known, VectorRows):
                newer._contents[name] = known.grown(read, name)  # type: ignore[arg-type]
            else:
                newer._contents[name] = known.grown(read, name, new_prefixes=False)  # type: ignore[arg-type]
        return newer

    def _refuse_overflow(self, table: str, feature: Feature) -> None:
        size, known = feature.vocabulary_size, len(self._vocabularies[table])
        if size is not None and known + 1 > size:
            raise DataError(
                f"table {table!r}: the training split has {known:,} values, vocabulary_size {size:,} holds "
                f"{size - 1:,} beside 'unknown'; raise it, set min_count, or use encoding: hash"
            )

    def only(self, features: Collection[str]) -> Self:
        """The same of some of the features, with what is learnt; they keep their order."""
        kept = tuple(f for f in self.schema.features if f.name in features)
        part = copy.copy(self)
        part.schema = self.schema.model_copy(update={"features": kept})
        return part

    def dense_columns(self) -> tuple[str, ...]:
        """The feature of each dense column."""
        return tuple(f.name for f in self.schema.dense_features for _ in range(2 if self._dense[f.name][2] else 1))

    def columns(self, *, with_labels: bool = True) -> list[str]:
        """The columns that `encode` reads."""
        labels = self.schema.label_columns() if with_labels else []
        return list(dict.fromkeys([f.rows_from for f in self.schema.features] + labels))

    # ------------------------------------------------------------------ stored with the model

    def save(self, folder: Path, *, for_network: bool = False) -> None:
        """Write the schema, the scales (JSON), the vocabularies, vectors and codes (Parquet).

        Args:
            for_network: True beside a network that holds the vectors; then only their keys are written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "schema": self.schema.model_dump(mode="json", exclude_unset=True),
            "dense": self._dense,
            "label_scale": self._label_scale,
            "vocabularies": list(self._vocabularies),
            "contents": {name: "" if for_network else of.digest() for name, of in self._contents.items()},
        }
        (folder / "encoder.json").write_text(json.dumps(about, indent=1))
        for i, vocabulary in enumerate(self._vocabularies.values()):
            pd.DataFrame({"value": vocabulary}).to_parquet(folder / f"vocabulary_{i}.parquet")
        for i, contents in enumerate(self._contents.values()):
            if isinstance(contents, VectorRows):
                contents.save(folder / f"vectors_{i}.parquet", keys_only=for_network)
            else:
                contents.save(folder / f"codes_{i}.parquet")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            DataError: vectors or codes are not those that were written.
        """
        about = json.loads((folder / "encoder.json").read_text())
        self = cls(Schema.model_validate(about["schema"]))
        self._dense = {k: (v[0], v[1], v[2]) for k, v in about["dense"].items()}
        self._label_scale = {k: (v[0], v[1]) for k, v in about["label_scale"].items()}
        for i, table in enumerate(about["vocabularies"]):
            self._vocabularies[table] = pd.Index(pd.read_parquet(folder / f"vocabulary_{i}.parquet")["value"])
        kinds = {f.name: f.kind for f in self.schema.features}
        for i, (name, digest) in enumerate(about.get("contents", {}).items()):
            of_vectors = kinds[name] == "vector"
            path = folder / f"{'vectors' if of_vectors else 'codes'}_{i}.parquet"
            contents: Contents = VectorRows.load(path) if of_vectors else CodeRows.load(path)
            if digest and contents.digest() != digest:
                raise DataError(f"{path}: not what the run was trained with (feature {name!r})")
            self._contents[name] = contents
        return self


def _refuse_other_meaning(old: Schema, new: Schema) -> None:
    """Raise ConfigError where a feature of both would look up or scale its values in another way."""
    before = {f.name: f for f in old.features}
    for feature in new.features:
        if feature.name in before:
            hashed = ("vocabulary_size",) if feature.encoding == "hash" else ()
            for field in ("kind", "encoding", "table_name", "transform", "clip", *hashed):
                was, now = getattr(before[feature.name], field), getattr(feature, field)
                if was != now:
                    raise ConfigError(f"feature {feature.name!r}: {field} was {was!r} and cannot become {now!r}")
