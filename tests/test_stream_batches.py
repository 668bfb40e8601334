"""Batches of a stream, to the bit, beside the plain way: shuffle the data frame of a window, encode it, cut it."""

from itertools import groupby

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtcl_torchrec.data.batch import EncodedRows
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.data.id_dropout import drop_ids
from mtcl_torchrec.data.jagged import Bag
from mtcl_torchrec.data.parquet import ParquetFiles
from mtcl_torchrec.data.position import Position, count, cut, pieces_left, shuffled
from mtcl_torchrec.data.stream import StreamRows
from mtcl_torchrec.schema import DataError, Feature, Schema, Task

SIZE, SEED = 1000, 5
IDS = Schema(
    features=[
        Feature(name="u", group="user", encoding="index", vocabulary_size=SIZE),
        Feature(name="i", group="item", encoding="index", vocabulary_size=SIZE),
    ],
    tasks=[Task.binary("click")],
)
EVERYTHING = Schema(
    features=[
        *IDS.features,
        Feature(name="rare", group="item", encoding="index", vocabulary_size=SIZE),  # integers, some missing
        Feature(name="floating", group="item", encoding="index", vocabulary_size=SIZE),
        Feature(name="bytes", group="item", encoding="index", vocabulary_size=256),
        Feature(name="flag", group="item"),
        Feature(name="known", group="item", min_count=2),
        Feature(name="city", group="user"),
        Feature(name="named", group="user"),  # a dictionary in the file
        Feature(name="hashed", group="user", encoding="hash", vocabulary_size=37),
        Feature(name="large", group="user", encoding="hash", vocabulary_size=64),
        Feature(name="tags", group="item", kind="bag"),
        Feature(name="numbers", group="item", kind="bag", encoding="index", vocabulary_size=SIZE),
        Feature(name="clicked", group="user", kind="history", of="i", max_length=3),
        Feature(name="ages", group="user", kind="history", beside="clicked", encoding="log_bucket", vocabulary_size=8),
        Feature(name="price", group="item", kind="dense"),
        Feature(name="rate", group="item", kind="dense", transform="logit", clip=2.0),
        Feature(name="seen", group="item", kind="dense", transform="log"),
        Feature(name="flagged", group="item", kind="dense", column="flag"),
    ],
    tasks=[
        Task.binary("click"),
        Task.binary("bought", mask="click"),
        Task.multiclass("stars", 5, sample_weight="w"),
        Task.regression("minutes"),
        Task(name="taste", kind="multiclass", item_class="known", label="known"),
    ],
    request="request",
    reward="reward",
)


def table_of(n):
    """Rows of every kind that Parquet has and features take."""
    draw = np.random.default_rng(0)
    ids, some = draw.integers(0, SIZE, (6, n)), draw.random((6, n)) < 0.2
    lists = [ids[0, : k % 5].tolist() for k in range(n)]
    return pa.table(
        {
            "u": ids[0],
            "i": pa.array(ids[1].astype(np.int32)),
            "rare": pa.array(ids[2], mask=some[0]),
            "floating": pa.array(ids[3].astype(float), mask=some[1]),
            "bytes": pa.array((ids[4] % 256).astype(np.uint8)),
            "flag": pa.array(ids[0] % 3 == 0, mask=some[2]),
            "known": pa.array(ids[1] % 40, mask=some[3]),
            "city": pa.array([f"c{k % 30}" for k in ids[2]], mask=some[4]),
            "named": pa.array([f"n{k % 7}" for k in ids[2]]).dictionary_encode(),
            "hashed": pa.array(ids[3], mask=some[0]),
            "large": pa.array(ids[3].astype(np.uint64) + np.uint64(2**63)),
            "tags": ["|".join(f"t{k % 9}" for k in of) for of in lists],
            "numbers": pa.array([None if k % 7 == 0 else of for k, of in enumerate(lists)], pa.list_(pa.int64())),
            "clicked": lists,
            "ages": [[float(10 * k) for k in of] for of in lists],
            "price": pa.array(draw.normal(size=n).astype(np.float32), mask=some[1]),
            "rate": draw.random(n),
            "seen": pa.array(ids[5], mask=some[5]),
            "click": (ids[0] % 2).astype(np.int8),
            "bought": pa.array(ids[1] % 5 == 0, mask=some[2]),
            "stars": pa.array((ids[4] % 5).astype(float), mask=some[3]),
            "minutes": draw.exponential(3, n).astype(np.float32),
            "w": draw.random(n),
            "request": [f"r{k // 4}" for k in range(n)],
            "reward": pa.array(draw.random(n), mask=some[4]),
            "not_read": ["x"] * n,
        }
    )


def stream_of(folder, schema, *, rows=700, row_group=64, window_rows=150, **options):
    table = table_of(rows)
    for name, part in [("a", table.slice(0, 70)), ("b", table.slice(70, 200)), ("c", table.slice(270))]:
        pq.write_table(part, folder / f"{name}.parquet", row_group_size=row_group)
    files = ParquetFiles.open([str(folder)], window_rows=window_rows)
    encoder = FeatureEncoder(schema).fit_stream(files)
    return StreamRows(files.only(encoder.columns()), encoder.encode, seed=SEED, **options)


def by_the_book(rows, position, *, rank, world_size, batch_size):
    """The batches, from data frames that are shuffled whole and encoded as they then lie."""
    windows, seed = rows.source.windows((SEED, position.epoch)), (SEED, position.epoch)
    shares = cut(pieces_left([(i, 0, w.rows) for i, w in enumerate(windows)], position.taken), world_size)
    parts = []
    for number, pieces in groupby(shares[rank], key=lambda piece: piece[0]):
        order = shuffled(windows[number].rows, (*seed, number)).numpy()
        picked = np.concatenate([order[start:stop] for _, start, stop in pieces])
        encoded = rows.encode(rows.source.read(windows[number]).at(picked))
        parts.append(drop_ids(encoded, rows.id_dropout, picked, (*seed, number)))
    blank = rows.encode(rows.source.empty())
    whole, largest = EncodedRows.cat([*parts, blank]), max(map(count, shares))
    for start in range(0, largest, batch_size):
        part = whole.slice(min(start, len(whole)), min(start + batch_size, len(whole)))
        yield part.batch().filled_up(min(batch_size, largest - start) if len(part) else 1)


def tensors(batch):
    sparse = batch.sparse_features
    found = {"dense": batch.dense_features, "values": sparse.values(), "lengths": sparse.lengths()}
    found |= {name: getattr(batch, name) for name in ("labels", "weights", "mask", "requests", "reward")}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def assert_same(got, wanted):
    assert len(got) == len(wanted)
    for batch, expected in zip(got, wanted, strict=True):
        assert batch.sparse_features.keys() == expected.sparse_features.keys()
        assert batch.largest_request == expected.largest_request
        these, those = tensors(batch), tensors(expected)
        assert these.keys() == those.keys()
        for name, tensor in these.items():
            other = those[name]
            assert (tensor.dtype, tensor.shape, tensor.stride()) == (other.dtype, other.shape, other.stride()), name
            assert tensor.numpy().tobytes() == other.numpy().tobytes(), name  # NaN and the sign of 0, too


@pytest.mark.parametrize("schema", [IDS, EVERYTHING], ids=["ids", "everything"])
@pytest.mark.parametrize("batch_size", [32, 97, 1000])
def test_batches_are_those_of_shuffled_frames_to_the_bit(tmp_path, schema, batch_size):
    rows = stream_of(tmp_path, schema, workers=2)
    for world_size in (1, 2, 3):
        for rank in range(world_size):
            of = {"rank": rank, "world_size": world_size, "batch_size": batch_size}
            assert_same(list(rows.batches(Position(2), **of)), list(by_the_book(rows, Position(2), **of)))


def test_so_they_are_after_a_resume_with_other_ranks_and_with_ids_left_out(tmp_path):
    rows = stream_of(tmp_path, EVERYTHING, id_dropout={"u": 0.3, "known": 0.5})
    position = Position(1).after(3, world_size=3, batch_size=20).after(2, world_size=1, batch_size=33)
    assert rows.rows_left(position) == 700 - 3 * 3 * 20 - 2 * 33
    for rank in range(2):
        of = {"rank": rank, "world_size": 2, "batch_size": 41}
        assert_same(list(rows.batches(position, **of)), list(by_the_book(rows, position, **of)))


def test_more_ranks_than_rows_are_left_and_small_windows(tmp_path):
    rows = stream_of(tmp_path, EVERYTHING, rows=280, row_group=7, window_rows=1)
    position = Position().after(276, world_size=1, batch_size=1)
    for rank in range(6):
        of = {"rank": rank, "world_size": 6, "batch_size": 2}
        assert_same(list(rows.batches(position, **of)), list(by_the_book(rows, position, **of)))


@pytest.mark.parametrize("largest", [2**31 - 1, 2**31, 2**62])
def test_ids_of_any_size_come_through(tmp_path, largest):
    """Numbers of rows that 32 bits do not hold, too."""
    ids = np.random.default_rng(0).integers(0, largest, 300)
    ids[:2] = 0, largest - 1
    pq.write_table(pa.table({"u": ids, "click": ids % 2}), tmp_path / "a.parquet", row_group_size=100)
    feature = Feature(name="u", group="user", encoding="index", vocabulary_size=largest)
    encoder = FeatureEncoder(Schema(features=[feature], tasks=[Task.binary("click")]))
    files = ParquetFiles.open([str(tmp_path)], window_rows=200)
    rows = StreamRows(files, encoder.fit_stream(files).encode, seed=SEED)
    got = rows.batches(Position(), rank=0, world_size=1, batch_size=64)
    found = torch.cat([batch.sparse_features.values() for batch in got])
    assert found.dtype == torch.int64
    assert sorted(found.tolist()) == sorted(ids.tolist())


# ---------------------------------------------------------------- what batches are made of


@pytest.mark.parametrize("window_rows", [20, 150, 700])
def test_a_column_taken_alone_is_that_of_the_frame(tmp_path, window_rows):
    rows = stream_of(tmp_path, EVERYTHING, window_rows=window_rows).source
    for window in (*rows.windows(), *rows.windows((1,))):
        frame, alone = rows.read(window).frame, rows.read(window)
        assert len(alone) == len(frame)
        for name in rows.schema.names:
            pd.testing.assert_series_equal(alone.column(name), frame[name])
            plain, dtype = alone.plain(name), frame[name].dtype
            assert (plain is not None) == (isinstance(dtype, np.dtype) and dtype.kind in "iufb"), name
            if plain is not None:
                assert plain.dtype == dtype
                np.testing.assert_array_equal(plain, frame[name].to_numpy())
    with pytest.raises(KeyError):
        alone.column("absent")


def test_a_negative_index_and_one_too_large_are_refused_with_file_and_row(tmp_path):
    rows = stream_of(tmp_path, IDS)
    for bad in (-1, SIZE):
        table = table_of(430)
        ids = table["u"].to_numpy().copy()
        ids[7] = bad
        pq.write_table(table.set_column(0, "u", pa.array(ids)), tmp_path / "c.parquet", row_group_size=64)
        rows.source = ParquetFiles.open([str(tmp_path)], window_rows=150).only(rows.source.schema.names)
        with pytest.raises(DataError, match=rf"c\.parquet, row 7: u = {bad} lies outside its table of 1,000 rows"):
            list(rows.batches(Position(), rank=0, world_size=1, batch_size=50))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_parts_are_the_rows_of_their_indices(data):
    n, width = data.draw(st.integers(1, 30)), data.draw(st.integers(0, 4))
    largest = data.draw(st.sampled_from([9, 2**31 - 1, 2**31, 2**62]))
    draw = np.random.default_rng(data.draw(st.integers(0, 9)))
    index = [torch.tensor(of, dtype=torch.int64) for of in data.draw(st.lists(st.lists(st.integers(0, n - 1))))]
    ids = torch.from_numpy(draw.integers(0, largest + 1, (n, width)))
    lengths = torch.from_numpy(draw.integers(0, 3, n))
    bag = Bag.of(torch.arange(int(lengths.sum())), lengths)
    keys = (*(f"id{i}" for i in range(width)), "bag")
    dense = torch.from_numpy(draw.random((n, 2), np.float32))
    rows = EncodedRows(dense=dense, keys=keys, ids=ids, labels=dense + 1, bags={"bag": bag}, requests=torch.arange(n))
    parts = rows.parts(index) if index else []
    assert len(parts) == len(index)
    for part, of in zip(parts, index, strict=True):
        assert torch.equal(part.ids, ids[of])
        assert part.ids.T.is_contiguous()
        assert torch.equal(part.dense, dense[of])
        assert torch.equal(part.labels, dense[of] + 1)
        assert torch.equal(part.requests, of)
        values, sizes = part.bags["bag"].all()
        assert [v.tolist() for v in values.split(sizes.tolist())] == [
            bag.values[bag.offsets[i] : bag.offsets[i + 1]].tolist() for i in of.tolist()
        ]
