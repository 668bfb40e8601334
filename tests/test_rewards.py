"""The column that a fused score is trained against: read for training, not asked of rows to be evaluated."""

import pandas as pd
import pytest

from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.schema import ConfigError, DataError, Feature, Schema, Task

TRAIN = pd.DataFrame({"tab": ["a", "b"], "worth": [0.5, None], "click": [0, 1], "who": ["x", "y"]})


def fitted(**more):
    schema = Schema(features=[Feature(name="tab", group="context")], tasks=[Task.binary("click")], **more)
    preprocessor = Preprocessor(schema)
    return preprocessor, preprocessor.fit(Rows(TRAIN))


def test_rows_to_be_evaluated_need_no_reward():
    preprocessor, train = fitted(reward="worth")
    assert train.rewards[0] == 0.5
    assert train.rewards[1].isnan()
    assert "worth" in preprocessor.columns()
    assert preprocessor.columns(statistics=False) == ["tab", "click"]
    later = preprocessor.encode(Rows(TRAIN[["tab", "click"]]))
    assert later.rewards is None
    assert later.labels.flatten().tolist() == [0, 1]
    with pytest.raises(DataError, match="worth"):
        preprocessor.encoder.encode(Rows(TRAIN[["tab", "click"]]))


def test_a_reward_that_is_an_input_too_is_read():
    schema = Schema(
        features=[Feature(name="worth", group="item", kind="dense")], tasks=[Task.binary("click")], reward="worth"
    )
    assert Preprocessor(schema).columns(statistics=False) == ["worth", "click"]


def test_requests_may_be_asked_for_after_training():
    preprocessor, train = fitted(user="who")
    assert train.requests is None
    preprocessor.compare_rows()
    later = preprocessor.encode(Rows(TRAIN))
    assert later.requests[0] != later.requests[1]
    with pytest.raises(ConfigError, match="names no request and no user"):
        fitted()[0].compare_rows()
