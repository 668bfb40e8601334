"""The schema says what it holds and refuses what does not fit together."""

import pydantic
import pytest

from mtcl_torchrec.modules.losses import MultiTaskLoss
from mtcl_torchrec.schema import Feature, Schema, Task, check_unique, nearest


def click():
    return Task.binary("click")


def message_of(make):
    with pytest.raises(pydantic.ValidationError) as caught:
        make()
    return str(caught.value)


def test_a_single_group_and_a_list_of_groups_are_both_tuples():
    assert Feature(name="a", group="user").group == ("user",)
    assert Feature(name="a", group=["user", "item"]).group == ("user", "item")
    assert Task.binary("t", inputs="item").inputs == ("item",)
    assert click().inputs == ("user", "item", "context")


def test_column_table_and_label_default_to_the_name():
    plain = Feature(name="a", group="user")
    named = Feature(name="a", group="user", column="c", table="t")
    assert (plain.rows_from, plain.table_name) == ("a", "a")
    assert (named.rows_from, named.table_name) == ("c", "t")
    assert (click().label_column, Task.binary("x", label="y").label_column) == ("click", "y")


def test_out_features_are_the_classes_or_one():
    assert Task.multiclass("tag", 18).out_features == 18
    assert click().out_features == 1
    assert Task.regression("watch").out_features == 1


@pytest.mark.parametrize("field", ["vocabulary_size", "embedding_dim", "pooling", "encoding", "min_count", "table"])
def test_dense_features_refuse_each_setting_of_embeddings(field):
    value = {"pooling": "sum", "encoding": "hash", "table": "t"}.get(field, 3)
    said = message_of(lambda: Feature(name="age", group="user", kind="dense", **{field: value}))
    assert f"feature 'age' is dense and has no {field}" in said


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"clip": 3.0}, "is no dense feature: transform"),
        ({"transform": "log"}, "is no dense feature: transform"),
        ({"encoding": "hash"}, "encoding 'hash' needs vocabulary_size"),
        ({"encoding": "index"}, "encoding 'index' needs vocabulary_size"),
        ({"embedding_dim": 6}, "embedding_dim is a multiple of 4"),
        ({"name": "a@b"}, "TorchRec takes no '@' in a name"),
        ({"vocabulary_size": 1}, "vocabulary_size must be at least 2"),
        ({"kind": "bag", "separator": ""}, "at least 1 character"),
        ({"group": []}, "at least 1 item"),
        ({"group": "usr"}, "'user', 'item' or 'context'"),
        ({"colum": "x"}, "Extra inputs are not permitted"),
    ],
)
def test_features_that_make_no_sense_are_refused(settings, part):
    assert part in message_of(lambda: Feature(**{"name": "a", "group": "user"} | settings))


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: Task(name="a", kind="multiclass"), "a multiclass task needs item_class"),
        (lambda: Task.binary("a", num_classes=3), "num_classes belongs to multiclass"),
        (lambda: Task.binary("a", item_class="tag"), "item_class belongs to multiclass"),
        (lambda: Task.binary("a", std=2.0), "belong to regression tasks"),
        (lambda: Task.multiclass("a", 3, loss="mse"), "belong to regression tasks"),
        (lambda: Task.binary("score"), "'score' is the key of the fused score"),
        (lambda: Task.binary("score_std"), "the spread of an ensemble's scores and cannot name a task"),
        (lambda: Task.binary("ranking"), "name it otherwise, and give its column as label: ranking"),
        (lambda: Task.binary(""), "a task needs a name"),
        (lambda: Task.binary("a", weight=-1), "greater than or equal to 0"),
        (lambda: Task.regression("a", std=0), "greater than 0"),
        # An infinite number would not survive being written as JSON or YAML.
        (lambda: Task.binary("a", weight=float("inf")), "finite number"),
        (lambda: Feature(name="a", group="user", kind="dense", clip=float("inf")), "finite number"),
    ],
)
def test_tasks_that_make_no_sense_are_refused(make, part):
    assert part in message_of(make)


def test_schema_splits_features_and_groups_them_by_table():
    user = Feature(name="user", group="user", table="people")
    price = Feature(name="price", group="item", kind="dense")
    author = Feature(name="author", group="item", table="people")
    tag = Feature(name="tag", group="item", kind="bag")
    schema = Schema(features=[user, price, tag, author], tasks=[click()])
    assert schema.sparse_features == (user, tag, author)
    assert schema.dense_features == (price,)
    assert schema.tables() == {"people": [user, author], "tag": [tag]}


def test_label_columns_are_listed_once_with_masks_and_weights():
    schema = Schema(
        features=[Feature(name="u", group="user")],
        tasks=[
            click(),
            Task.binary("long", mask="click", sample_weight="w"),
            Task.regression("time", label="ms", sample_weight="w"),
        ],
    )
    assert schema.label_columns() == ["click", "long", "w", "ms"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("embedding_dim", 8),
        ("pooling", "sum"),
        ("min_count", 2),
        ("vocabulary_size", 9),
    ],
)
def test_features_of_one_table_must_agree(field, value):
    one = Feature(name="a", group="user", table="t")
    other = Feature(name="b", group="item", table="t", **{field: value})
    said = message_of(lambda: Schema(features=[one, other], tasks=[click()]))
    assert f"features a and b share table 't' and must agree on {field}" in said


def test_names_are_unique_and_item_class_must_exist():
    a = Feature(name="a", group="user")
    assert "feature 'a' is declared twice" in message_of(lambda: Schema(features=[a, a], tasks=[click()]))
    assert "task 'click' is declared twice" in message_of(lambda: Schema(features=[a], tasks=[click(), click()]))
    tag = Feature(name="video_tag", group="item")
    said = message_of(lambda: Schema(features=[tag], tasks=[Task.multiclass("t", 3, item_class="vido_tag")]))
    assert "item_class 'vido_tag' is no id feature (did you mean 'video_tag'?)" in said


def test_schema_needs_a_feature_and_a_task_and_cannot_be_changed():
    a = Feature(name="a", group="user")
    assert "features" in message_of(lambda: Schema(features=[], tasks=[click()]))
    assert "tasks" in message_of(lambda: Schema(features=[a], tasks=[]))
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        a.name = "b"


def test_weights_that_train_nothing_are_refused():
    features = [Feature(name="a", group="user")]
    nothing = [Task.binary("click", weight=0), Task.binary("like", weight=0)]
    assert "tasks 'click', 'like' all have weight 0: nothing would be trained" in message_of(
        lambda: Schema(features=features, tasks=nothing)
    )
    with pytest.raises(ValueError, match="task 'click' has weight 0: nothing would be trained"):
        MultiTaskLoss(nothing[:1])
    MultiTaskLoss([*nothing, Task.binary("buy")])


def test_nearest_is_silent_where_nothing_is_near():
    assert nearest("zzz", ["click", "like"]) == ""
    assert nearest("lik", ["click", "like"]) == " (did you mean 'like'?)"
    check_unique("task", ["a", "b"])
    with pytest.raises(ValueError, match="task 'b' is declared twice"):
        check_unique("task", ["a", "b", "b"])
