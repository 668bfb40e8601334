"""Learning in parts, on ranks, and from an encoder that grows: the same as learning from everything at once."""

from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.data.fitting import Moments
from mtcl_torchrec.data.parquet import ParquetFiles
from mtcl_torchrec.data.source import Rows, read_rows
from mtcl_torchrec.data.vocabulary import ValueCounts, build_vocabulary, table_rows
from mtcl_torchrec.schema import ConfigError, DataError, Feature, Schema, Task

NAN = float("nan")
SCHEMA = Schema(
    features=[
        Feature(name="whole", group="user"),
        Feature(name="missing", group="user", min_count=2),
        Feature(name="half", group="user"),
        Feature(name="text", group="item"),
        Feature(name="author", group="item", table="people"),
        Feature(name="friends", group="user", kind="bag", table="people"),
        Feature(name="tags", group="item", kind="bag", min_count=3),
        Feature(name="price", group="item", kind="dense", transform="log"),
        Feature(name="age", group="user", kind="dense"),
        Feature(name="constant", group="user", kind="dense"),
    ],
    tasks=[
        Task.binary("click"),
        Task.regression("minutes", mask="click"),
        Task(name="taste", kind="multiclass", label="text", item_class="text"),
    ],
)


def some_rows(n=900, seed=0):
    draw = np.random.default_rng(seed)
    number = pa.array([None if draw.random() < 0.1 else int(i) for i in draw.integers(0, 60, n)], pa.int64())
    half = np.where(np.arange(n) < n - 5, draw.integers(0, 9, n), draw.integers(0, 9, n) + 0.5)
    return pa.table(
        {
            "whole": draw.integers(-(2**61), 2**61, n) // 2**55,
            "missing": number,
            "half": pa.array(half, from_pandas=True),
            "text": [f"t{i}" if i else None for i in draw.integers(0, 20, n)],
            "author": draw.integers(0, 30, n),
            "friends": [[int(x) for x in draw.integers(0, 40, draw.integers(0, 4))] for _ in range(n)],
            "tags": ["|".join(draw.choice(["a", "b", "c", f"rare{i}"], draw.integers(0, 3))) for i in range(n)],
            "price": pa.array(np.where(draw.random(n) < 0.2, NAN, draw.exponential(9, n)), from_pandas=True),
            "age": draw.integers(18, 80, n),
            "constant": np.full(n, 0.1),
            "click": draw.integers(0, 2, n).astype(np.int8),
            "minutes": np.where(np.arange(n) % 2, NAN, 1e6 + draw.random(n)),
        }
    )


def learnt(encoder):
    vocabularies = {table: (str(index.dtype), index.tolist()) for table, index in encoder._vocabularies.items()}
    return vocabularies, encoder._dense, encoder._label_scale


def assert_alike(one, other):
    assert one[0] == other[0]
    for scales, others in zip(one[1:], other[1:], strict=True):
        assert scales.keys() == others.keys()
        for name in scales:
            assert scales[name] == pytest.approx(others[name], rel=1e-9)


def write(folder, table, row_group_size):
    cuts = [0, 1, len(table) // 3, len(table)]
    for i, (start, stop) in enumerate(pairwise(cuts)):
        pq.write_table(table[start:stop], folder / f"{i}.parquet", row_group_size=row_group_size)
    return str(folder)


@pytest.mark.parametrize("window_rows", [1, 100, 10**6])
def test_learning_from_files_equals_learning_in_memory(tmp_path, window_rows):
    path = write(tmp_path, some_rows(), 40)
    rows = read_rows([path])
    in_memory = FeatureEncoder(SCHEMA).fit(rows)
    streamed = FeatureEncoder(SCHEMA).fit_stream(ParquetFiles.open([path], window_rows=window_rows), workers=2)
    assert_alike(learnt(streamed), learnt(in_memory))
    one, other = streamed.encode(rows), in_memory.encode(rows)
    assert torch.equal(one.ids, other.ids)
    torch.testing.assert_close(one.dense, other.dense)


def on_a_rank(path):
    dist.init_process_group("gloo")
    try:
        return learnt(FeatureEncoder(SCHEMA).fit_stream(ParquetFiles.open([path], window_rows=100)))
    except DataError as error:
        return str(error)
    finally:
        dist.barrier()
        dist.destroy_process_group()


def test_ranks_learn_their_parts_and_all_get_the_very_same_whole(tmp_path):
    path = write(tmp_path, some_rows(), 40)
    ranks = run_ranks(on_a_rank, 2, path)
    assert ranks[0] == ranks[1]
    assert_alike(ranks[0], learnt(FeatureEncoder(SCHEMA).fit(read_rows([path]))))


def test_what_one_rank_finds_wrong_is_told_by_all(tmp_path):
    table = some_rows(300)
    wrong = table["click"].to_numpy().copy()
    wrong[299] = 3
    path = write(tmp_path, table.set_column(table.schema.names.index("click"), "click", pa.array(wrong)), 40)
    ranks = run_ranks(on_a_rank, 2, path)
    assert ranks[0] == ranks[1]
    assert "2.parquet, row 199: click = 3; a label of binary task 'click' is 0 or 1" in ranks[0]


def test_a_label_without_a_value_is_refused_by_all_ranks_and_one_without_on_a_rank_is_not(tmp_path):
    table = some_rows(600)
    at = table.schema.names.index("minutes")
    first = np.where(np.arange(600) < 100, table["minutes"].to_numpy(), NAN)
    path = write(tmp_path, table.set_column(at, "minutes", pa.array(first)), 100)
    ranks = run_ranks(on_a_rank, 2, path)
    assert_alike(ranks[1], learnt(FeatureEncoder(SCHEMA).fit(read_rows([path]))))
    path = write(tmp_path, table.set_column(at, "minutes", pa.nulls(600, pa.float64())), 100)
    for message in run_ranks(on_a_rank, 2, path):
        assert "label column 'minutes' holds no value where 'click' is true" in message


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([1, 2], ["2", "x"]), ([1, 2], [2.0, 3.5]), ([1.0, None], [2**40, 5]), (["a"], [None]), ([None], [5, 6]),
        ([True, False], [None, True]), (pd.Categorical(["b", "a"]), ["c"]), ([b"b"], [b"a"]),
        (pd.to_datetime(["2024"]), pd.to_datetime(["2023", "2024"])), (pd.to_datetime(["2024"]).date, [None]),
        (np.array([200], np.uint8), np.array([-3], np.int16)), (np.array([2**63], np.uint64), np.array([1], np.uint64)),
    ],
)  # fmt: skip
def test_files_that_differ_in_kind_are_learnt_like_in_memory(tmp_path, first, second):
    schema = Schema(features=[Feature(name="x", group="user")], tasks=[Task.binary("y")])
    for name, values in [("a", first), ("b", second)]:
        pd.DataFrame({"x": values, "y": 1}).to_parquet(tmp_path / f"{name}.parquet")
    in_memory = FeatureEncoder(schema).fit(read_rows([str(tmp_path)]))
    streamed = FeatureEncoder(schema).fit_stream(ParquetFiles.open([str(tmp_path)], window_rows=1))
    assert_alike(learnt(streamed), learnt(in_memory))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.floats(-1e5, 1e5) | st.just(NAN), max_size=8), min_size=1, max_size=6))
def test_moments_merge_to_those_of_all_values(parts):
    merged = Moments()
    for part in parts:
        merged = merged.merge(Moments.of(np.array(part)))
    values = np.array(list(chain.from_iterable(parts)), float)
    present = values[~np.isnan(values)]
    assert (merged.count, merged.missing) == (len(present), len(values) - len(present))
    if len(present):
        assert merged.mean == pytest.approx(present.mean(), rel=1e-9, abs=1e-9)
        assert merged.variance == pytest.approx(present.var(), rel=1e-7, abs=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.lists(st.integers(-5, 60) | st.none(), max_size=30), min_size=1, max_size=12),
    min_count=st.integers(1, 3),
)
def test_values_counted_in_parts_make_the_vocabulary_of_all(parts, min_count):
    counts = [ValueCounts(), ValueCounts()]
    for i, part in enumerate(parts):
        counts[i % 2].add(pd.Series(part, dtype="Int64"))
    counts[0].merge(counts[1])
    whole = pd.Series(list(chain.from_iterable(parts)), dtype="Int64").value_counts()
    assert build_vocabulary(counts[:1], min_count).tolist() == sorted(whole[whole >= min_count].index)


def test_many_threads_may_look_up_at_once_for_the_first_time():
    values = np.random.default_rng(0).permutation(300_000)
    for dtype in (np.int64, str):
        vocabulary = pd.Index(values.astype(dtype))
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _, v=vocabulary: table_rows(v, pd.Series(v)), range(8)))
        assert all((rows == np.arange(1, len(values) + 1)).all() for rows in found)


# ---------------------------------------------------------------- growing


def fit(values, old=None, **options):
    kind = options.pop("kind", "id")
    schema = Schema(features=[Feature(name="x", group="user", kind=kind, **options)], tasks=[Task.regression("y")])
    frame = pd.DataFrame({"x": values, "y": np.arange(len(values)) + 10.0 * (old is None)})
    return FeatureEncoder(schema).fit(Rows(frame), grown_from=old)


def rows_of(encoder, values):
    return encoder.encode(Rows(pd.DataFrame({"x": values})), with_labels=False).ids[:, 0].tolist()


@pytest.mark.parametrize(
    ("old", "new", "later", "expected"),
    [
        (["m", "c"], ["z", "c", "a"], ["c", "m", "a", "z", "q"], [1, 2, 3, 4, 0]),
        ([20, 10], [15, 10, 5], [10, 20, 5, 15, 7], [1, 2, 3, 4, 0]),
        ([20, 10], [None, 15.0], [10, 20, 15, None], [1, 2, 3, 0]),
        ([20, 10], ["x", "10"], [10, "20", "x", 20.0], [1, 2, 3, 2]),
        (["20", "10"], [5, 10], ["10", 20, 5], [1, 2, 3]),
        ([20, 10], [2.5, 10], [10, 20, 2.5], [1, 2, 3]),
        ([None], ["b", "a"], ["a", "b"], [1, 2]),
        (["b", "a"], [None], ["a", "b"], [1, 2]),
    ],
)
def test_known_ids_keep_their_rows_and_new_ones_get_the_next(old, new, later, expected, tmp_path):
    grown = fit(new, fit(old))
    assert rows_of(grown, later) == expected
    grown.save(tmp_path)
    again = FeatureEncoder.load(tmp_path)
    assert rows_of(again, later) == expected
    more = fit(["new"], again) if isinstance(later[0], str) else fit([99], again)
    assert rows_of(more, later) == expected
    assert more.num_embeddings("x") == again.num_embeddings("x") + 1


def test_spare_rows_are_filled_until_there_are_none():
    first = fit([1, 2], vocabulary_size=5)
    grown = fit([3, 4], first, vocabulary_size=5)
    assert (first.num_embeddings("x"), grown.num_embeddings("x")) == (5, 5)
    assert rows_of(grown, [1, 2, 3, 4]) == [1, 2, 3, 4]
    with pytest.raises(DataError, match="table 'x': the training split has 5 values, vocabulary_size 5 holds 4"):
        fit([9], grown, vocabulary_size=5)
    assert fit([9], grown, vocabulary_size=9).num_embeddings("x") == 9
    assert fit([3, 3, 4], fit([1, 2]), min_count=2).num_embeddings("x") == 4


def test_scales_stay_as_the_model_knows_them():
    old = fit([1.0, 3.0], kind="dense")
    grown = fit([100.0, 500.0, NAN], old, kind="dense")
    assert grown._dense == old._dense
    assert grown.resolved_tasks() == old.resolved_tasks()
    assert fit([100.0, 500.0, NAN], kind="dense")._dense != old._dense


def test_growing_works_in_a_stream_and_adds_new_features(tmp_path):
    old = FeatureEncoder(SCHEMA).fit(Rows(read_rows([write(tmp_path, some_rows(200), 50)]).frame))
    path = write(tmp_path, some_rows(400, seed=1), 50)
    more = SCHEMA.model_copy(
        update={
            "features": (
                *SCHEMA.features,
                Feature(name="again", column="whole", group="item"),
                Feature(name="old", column="age", group="user", kind="dense"),
            )
        }
    )
    in_memory = FeatureEncoder(more).fit(read_rows([path]), grown_from=old)
    streamed = FeatureEncoder(more).fit_stream(ParquetFiles.open([path], window_rows=90), grown_from=old)
    assert_alike(learnt(streamed), learnt(in_memory))
    for table, vocabulary in old._vocabularies.items():
        assert streamed._vocabularies[table][: len(vocabulary)].tolist() == vocabulary.tolist()
    assert len(streamed._vocabularies["whole"]) > len(old._vocabularies["whole"])
    assert streamed._dense["price"] == old._dense["price"]


@pytest.mark.parametrize(
    ("before", "after", "part"),
    [
        ({"encoding": "hash", "vocabulary_size": 9}, {"encoding": "hash", "vocabulary_size": 5}, "vocabulary_size was"),
        ({}, {"table": "t"}, "table_name was 'x' and cannot become 't'"),
        ({"kind": "dense"}, {"kind": "dense", "transform": "log"}, "transform was 'none' and cannot become 'log'"),
    ],
)  # fmt: skip
def test_a_feature_cannot_come_to_mean_something_else(before, after, part):
    with pytest.raises(ConfigError, match=f"feature 'x': {part}"):
        fit([1, 2], fit([1, 2], **before), **after)
