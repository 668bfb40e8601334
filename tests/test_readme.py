"""What the README shows is run as it stands there."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from torchrec import KeyedJaggedTensor
from torchrec.datasets.utils import Batch

from mtcl_torchrec.config import parse_run
from mtcl_torchrec.training.sharding import ranks

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def block(language, containing):
    blocks = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    return next(b for b in blocks if containing in b)


def batch(rows, seed):
    g = torch.Generator().manual_seed(seed)
    items = torch.randint(0, 100_000, (rows,), generator=g)
    kjt = KeyedJaggedTensor(keys=["item"], values=items, lengths=torch.ones(rows, dtype=torch.int64))
    labels = torch.stack([(items % 2).float(), torch.full((rows,), float("nan")), torch.randn(rows, generator=g)], 1)
    return Batch(torch.randn(rows, 13, generator=g), kjt, labels)


def test_the_torchrec_example_trains_and_scores():
    with ranks("cpu") as where:
        ask = batch(7, seed=99)
        names = {
            "device": where.device, "batches": iter([batch(16, seed) for seed in range(3)]),
            "dense_features": ask.dense_features, "sparse_features": ask.sparse_features,
        }  # fmt: skip
        exec(block("python", "MTCL("), names)
        assert names["loss"].isfinite()
        assert set(names["logits"]) == {"click", "like", "watch_time"}
        out = names["out"]
        assert out["score"].shape == (7,)
        assert out["score"].min() >= 0
        assert out["score"].max() <= 1
        # The prediction is that of these rows, not of a batch in the pipeline: alone, a row scores the same.
        first = KeyedJaggedTensor(keys=["item"], values=ask.sparse_features.values()[:1], lengths=torch.ones(1).long())
        alone = names["model"](ask.dense_features[:1], first)
        assert alone["score"].item() == pytest.approx(out["score"][0].item(), abs=1e-6)
        names.clear()
        del out, alone


def test_the_yaml_is_a_run():
    run = parse_run(block("yaml", "fusion:"))
    assert [t.name for t in run.data_schema.tasks] == ["click", "buy", "taste", "minutes"]
    assert run.statistics[1].given == ["product_id"]
    assert yaml.safe_load(block("yaml", "fusion:"))["name"] == "shop"


def test_texts_and_histories_are_a_run():
    run = parse_run("name: films\ndata: {log: log.parquet}\n" + block("yaml", "kind: semantic_id"))
    assert set(run.data_schema.sequence_tables()) >= {"item_id"}
    assert run.model.sequences["clicked"].kind == "transformer"


def test_each_fused_score_fits_into_the_run():
    raw = yaml.safe_load(block("yaml", "fusion:"))
    fusions = yaml.safe_load(block("yaml", "kind: expected_value"))
    kinds = [parse_run(yaml.safe_dump(raw | {"fusion": fusion})).fusion.kind for fusion in fusions]
    assert len(set(kinds)) == len(kinds) == 8


def test_the_yaml_of_tasks_that_share_fits_into_a_run():
    raw, more = yaml.safe_load(block("yaml", "fusion:")), yaml.safe_load(block("yaml", "balance:"))
    raw["schema"]["tasks"] = more["schema"]["tasks"]
    raw["fusion"]["weights"] = {"buy": 1}
    raw["model"] |= more["model"]
    raw["training"] |= more["training"]
    run = parse_run(yaml.safe_dump(raw | {"balance": more["balance"]}))
    assert (run.balance.surgery.kind, run.model.trunk.kind) == ("upgrad", "adatt")
    assert run.data_schema.tasks[1].conditional_name == "buy|click"
