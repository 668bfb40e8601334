"""Penalties equal loops over rows, experts and weights."""

import copy
import json

import pytest
import torch
from torch.nn import functional as F
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from mtcl_torchrec import MTCL, PLE, MMoE, MTBatch, MTCLTrain, SharedBottom, SingleTask, Task
from mtcl_torchrec.config import dump_run, parse_run
from mtcl_torchrec.modules.embeddings import with_own_tables
from mtcl_torchrec.modules.regularisers import REGULARISERS, Regularisers
from mtcl_torchrec.modules.trunks import STEM
from mtcl_torchrec.schema import ConfigError

TASKS = [Task.binary("click"), Task.binary("like"), Task.regression("stars", inputs=("user",))]


def train_module(trunk, regularisers, tasks=TASKS):
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(name=f"t_{f}", num_embeddings=50, embedding_dim=8, feature_names=[f]) for f in ("u", "i")
    ]
    groups = {"u": ["user"], "i": ["item"]}
    model = MTCL(EmbeddingBagCollection(tables=tables), 0, trunk, tasks, tower_layers=[4], feature_groups=groups)
    return MTCLTrain(model, regularisers=regularisers)


def batch(rows=20, unlabelled=3):
    g = torch.Generator().manual_seed(4)
    labels = torch.randint(0, 2, (rows, 3), generator=g).float()
    labels[:unlabelled] = float("nan")
    ids = KeyedJaggedTensor(
        ["u", "i"], torch.randint(0, 50, (2 * rows,), generator=g), lengths=torch.ones(2 * rows).long()
    )
    return MTBatch(torch.empty(rows, 0), ids, labels)


def penalty(train, name):
    """What a regulariser of weight 1 adds to the loss."""
    bare = MTCLTrain(copy.deepcopy(train.model))
    return train(batch())[0] - bare(batch())[0].detach()


def labelled_mixes(train):
    """(gates, experts, weights, outputs) of the rows with a label."""
    return [[(m.gates, m.experts, m.weights[:, 3:], m.outputs[:, 3:]) for m in level.mixes]
            for level in train.model.tower.expert_levels()]  # fmt: skip


def trunks():
    return {"mmoe": MMoE(3, [6]), "ple": PLE(2, 2, [6], levels=2)}


@pytest.mark.parametrize("trunk", ["mmoe", "ple"])
def test_expert_orthogonality_is_the_mean_squared_cosine_of_pairs_of_experts(trunk):
    train = train_module(trunks()[trunk], {"expert_orthogonality": 1.0})
    got = penalty(train, "expert_orthogonality")
    means = []
    for level in labelled_mixes(train):
        for _, experts, _, outputs in level:
            e = range(len(experts))
            cosines = [F.cosine_similarity(outputs[a], outputs[b], dim=-1) for a in e for b in e if a < b]
            means.append(torch.stack(cosines).square().mean())
    assert 0 < got < 1
    torch.testing.assert_close(got, torch.stack(means).mean(), rtol=1e-4, atol=1e-6)


def test_gate_balance_of_gates_that_see_all_experts_is_the_squared_coefficient_of_variation():
    train = train_module(MMoE(4, [6]), {"gate_balance": 1.0})
    got = penalty(train, "gate_balance")
    importance = sum(weights.sum((0, 1)) for level in labelled_mixes(train) for _, _, weights, _ in level)
    expected = importance.var(correction=0) / importance.mean() ** 2
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-7)
    with torch.no_grad():  # gates that send every row to expert 2: three of four unused
        level = train.model.tower.expert_levels()[0]
        level.gate_weight.zero_()
        assert penalty(train, "gate_balance").abs() < 1e-6
        x = train.model.embedding_bag_collection(batch().sparse_features).values()
        level.gate_weight[:, 2] = 1e4 * x.mean(0)
    collapsed = importance_of(train)
    torch.testing.assert_close(collapsed.var(correction=0) / collapsed.mean() ** 2, penalty(train, "gate_balance"))


def importance_of(train):
    train(batch())
    return sum(weights.sum((0, 1)) for level in labelled_mixes(train) for _, _, weights, _ in level).detach()


def test_gate_balance_of_gates_that_see_some_experts_compares_with_an_even_use_by_each():
    train = train_module(PLE(2, 1, [6], levels=1), {"gate_balance": 1.0})
    with torch.no_grad():
        train.model.tower.expert_levels()[0].gate_weight.zero_()
    assert penalty(train, "gate_balance").abs() < 1e-6  # every gate mixes evenly, though shared experts get more
    train = train_module(PLE(2, 1, [6], levels=1), {"gate_balance": 1.0})
    got, use, even = penalty(train, "gate_balance"), torch.zeros(5), torch.zeros(5)
    for gates, experts, weights, _ in labelled_mixes(train)[0]:
        for g in range(len(gates)):
            seen = [e for e in range(len(experts)) if weights[g, :, e].sum() > 0]
            for e in seen:
                use[experts[e]] += weights[g, :, e].mean().detach()
                even[experts[e]] += 1 / len(seen)
    torch.testing.assert_close(got, ((use - even) ** 2 / even).sum() / even.sum(), rtol=1e-3, atol=1e-7)


def test_l2_of_dense_weights_leaves_out_biases_norms_and_tables():
    train = train_module(MMoE(2, [6]), {"l2_dense": 1.0})
    names = {n for n, _ in train.model.tower.named_parameters()}
    kept = {n for n in names if not {"bias", "biases", "scales", "shifts"} & set(n.split("."))}
    assert (
        {"trunk.levels.0.gate_weight", "heads.0.weight", "trunk.levels.0.experts.weights.0", "towers.weights.0"}
        <= kept
        < names
    )
    expected = sum(p.square().sum() for n, p in train.model.tower.named_parameters() if n in kept)
    got = penalty(train, "l2_dense")
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    plain = copy.deepcopy(train.model.tower)
    got.backward()
    gradients = dict(train.model.tower.named_parameters())
    bare = MTCLTrain(copy.deepcopy(train.model))
    bare.zero_grad()
    bare(batch())[0].backward()
    for name, p in bare.model.tower.named_parameters():
        added = 2 * dict(plain.named_parameters())[name] if name in kept else 0
        torch.testing.assert_close(gradients[name].grad, p.grad + added, rtol=1e-4, atol=1e-5)
    assert len(train.state_dict()) == len(bare.state_dict())  # nothing is stored twice


def test_several_regularisers_add_up_with_their_weights():
    ones = {name: {"u": 1.0} if name == "l2_rows" else 1.0 for name in REGULARISERS}
    each = {name: penalty(train_module(MMoE(3, [6]), {name: one}), name) for name, one in ones.items()}
    weights = dict(zip(REGULARISERS, (0.1, 0.05, 0.01, 0.3, 0.2), strict=True))
    together = penalty(train_module(MMoE(3, [6]), {**weights, "l2_rows": {"u": 0.05}}), "all")
    torch.testing.assert_close(together, sum(weights[n] * each[n] for n in REGULARISERS), rtol=1e-4, atol=1e-5)


def test_in_evaluation_the_loss_goes_without_penalties_on_experts():
    train = train_module(MMoE(3, [6]), {"expert_orthogonality": 1.0, "gate_balance": 1.0}).eval()
    torch.testing.assert_close(train(batch())[0], MTCLTrain(copy.deepcopy(train.model)).eval()(batch())[0])


def test_a_penalty_that_is_not_finite_skips_the_batch_under_its_name_and_leaves_no_gradient():
    train = train_module(MMoE(3, [6]), {"gate_balance": 1.0, "expert_orthogonality": 1.0})
    with torch.no_grad():
        train.model.tower.expert_levels()[0].gate_weight[0, 0] = float("nan")
    loss, _ = train(batch())
    loss.backward()
    assert train.loss.skipped().steps == 1
    assert "gate_balance" in train.loss.skipped().last_parts
    assert "expert_orthogonality" not in train.loss.skipped().last_parts
    for bag in train.model.embedding_bag_collection.embedding_bags.values():
        assert not bag.weight.grad.any()


def plain_l2(train, of_features):
    """Σ λ ‖row of the table‖² of each look-up, mean over the rows with a label, from the tables themselves."""
    data, bags = batch(), train.model.embedding_bag_collection.embedding_bags
    total = 0.0
    for feature, weight in of_features.items():
        rows = bags[f"t_{feature}"].weight[data.sparse_features[feature].values()]
        total = total + weight * rows[3:].square().sum(1).mean()
    return total


@pytest.mark.parametrize("of_features", [{"u": 0.04, "i": 0.01}, {"i": 0.3}, {"u": 0.2, "i": 0.0}])
def test_l2_of_embeddings_by_feature_is_that_of_each_look_up(of_features):
    train = train_module(SharedBottom([6]), {"l2_embedding": of_features})
    got, expected = penalty(train, "l2_embedding"), plain_l2(train, of_features)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    tables = train.model.embedding_bag_collection.embedding_bags
    weights = {name: tables[f"t_{name}"].weight for name in ("u", "i")}
    by_hand = torch.autograd.grad(expected, list(weights.values()), allow_unused=True)
    added = torch.autograd.grad(got, list(weights.values()))
    bare = MTCLTrain(copy.deepcopy(train.model))
    alone = torch.autograd.grad(
        bare(batch())[0], [bare.model.embedding_bag_collection.embedding_bags[f"t_{n}"].weight for n in weights]
    )
    for of, hand, base in zip(added, by_hand, alone, strict=True):
        torch.testing.assert_close(of, base + (0 if hand is None else hand), rtol=1e-4, atol=1e-6)


def test_one_number_is_the_same_number_for_every_feature_and_no_number_above_0_is_none():
    one = penalty(train_module(MMoE(2, [6]), {"l2_embedding": 0.1}), "l2_embedding")
    each = penalty(train_module(MMoE(2, [6]), {"l2_embedding": {"u": 0.1, "i": 0.1}}), "l2_embedding")
    torch.testing.assert_close(one, each)
    none = train_module(MMoE(2, [6]), {"l2_embedding": {"u": 0.0}})
    assert none.loss.regularisers.active == ()
    assert penalty(none, "l2_embedding") == 0


def test_l2_of_rows_weighs_each_look_up_by_one_over_how_often_its_id_was_met():
    train = train_module(SharedBottom([6]), {"l2_rows": {"u": 0.04, "i": 0.3}})
    data, bags = batch(), train.model.embedding_bag_collection.embedding_bags
    bare = MTCLTrain(copy.deepcopy(train.model))
    for met in (1, 2, 3):  # the same batch again and again: frequencies stay what they are
        got = train(data)[0] - bare(data)[0].detach()
        expected = 0.0
        for feature, weight in (("u", 0.04), ("i", 0.3)):
            ids = data.sparse_features[feature].values()
            counts = met * torch.bincount(ids, minlength=50)
            rows = bags[f"t_{feature}"].weight[ids].square().sum(1) * met * 20 / (50 * counts[ids])
            expected = expected + weight * rows[3:].mean()  # three rows have no label
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    data.labels[0] = float("inf")
    train(data)  # a batch that is skipped is not counted
    train.eval()
    train(batch())
    assert train.loss.regularisers.row_penalty.popularity[0].total == 60  # evaluation counts nothing


def test_over_an_epoch_l2_of_rows_pulls_at_every_row_of_the_table_alike():
    """λ/R for each row, however often it is met: what one pass over rows with fixed frequencies adds up to."""
    train = train_module(SharedBottom([6]), {"l2_rows": {"u": 0.5}})
    ids = torch.arange(50).repeat_interleave(torch.arange(50) % 5 + 1)  # each 1 to 5 times, 150 in all
    order = ids[torch.randperm(150, generator=torch.Generator().manual_seed(0))].view(10, 15)
    bags, penalty = train.model.embedding_bag_collection, train.loss.regularisers
    parts = [KeyedJaggedTensor(["u", "i"], torch.cat([u, u]), lengths=torch.ones(30).long()) for u in order]
    for part in parts:
        penalty.row_penalty(part)  # a pass that only counts
    penalty.row_penalty.eval()
    sums = [penalty.sums(bags(part), torch.ones(15), torch.tensor(False), part)["l2_rows"] for part in parts]
    table = bags.embedding_bags["t_u"].weight
    got = torch.autograd.grad(torch.cat(sums).sum() / 150, table)[0]
    torch.testing.assert_close(got, 0.5 * 2 * table.detach() / 50, rtol=1e-4, atol=1e-7)


def test_a_feature_of_several_tables_is_pulled_at_in_all_of_them():
    torch.manual_seed(0)
    tables = [EmbeddingBagConfig(name="t", num_embeddings=50, embedding_dim=8, feature_names=["u", "i"])]
    model = MTCL(EmbeddingBagCollection(tables=with_own_tables(tables, ["click", "like"])), 0, STEM([6]), TASKS[:2])
    train = MTCLTrain(model, regularisers={"l2_embedding": {"i": 0.5}})
    data, bags = batch(), model.embedding_bag_collection.embedding_bags
    ids = data.sparse_features["i"].values()[3:]
    expected = 0.5 * sum(bags[name].weight[ids].square().sum(1).mean() for name in ("t", "t@click", "t@like"))
    data.labels = data.labels[:, :2]
    got = train(data)[0] - MTCLTrain(copy.deepcopy(model))(data)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


RUN = """
data: {log: a.parquet}
schema:
  time: t
  features: [{name: user_id, group: user}, {name: price, group: item, kind: dense}]
  tasks: [{name: click, kind: binary}]
training: {regularisers: {l2_embedding: GIVEN}}
"""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{usr_id: 1}", r"training.regularisers.l2_embedding: no feature 'usr_id' .*\(did you mean 'user_id'\?\)"),
        ("{price: 1}", "training.regularisers.l2_embedding: no feature 'price' that has embeddings"),
        ("{user_id: -1}", "training.regularisers.l2_embedding: the penalty of 'user_id' is a number of at least 0"),
        ("{user_id: true}", "the penalty of 'user_id' is a number of at least 0, not True"),
        ("-1", "the penalty is a number of at least 0, not -1"),
        ("0, l2_rows: {usr_id: 1}", r"training.regularisers.l2_rows: no id feature 'usr_id' .*'user_id'\?\)"),
        ("0, l2_rows: {price: 1}", "training.regularisers.l2_rows: no id feature 'price'"),
        ("0, l2_rows: {user_id: -1}", "l2_rows.user_id: .* greater than or equal to 0"),
        ("much", "the penalty is a number of at least 0, not 'much'"),
        ("[1]", "the penalty is a number of at least 0"),
        (".inf", "the penalty is a number of at least 0, not inf"),
    ],
)
def test_yaml_refuses_what_is_no_penalty_on_embeddings_in_one_line(given, message):
    with pytest.raises(ConfigError, match=message) as refused:
        parse_run(RUN.replace("GIVEN", given))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("given", [0.04, {"user_id": 0.04}, {"user_id": 0.0}])
def test_yaml_keeps_a_penalty_on_embeddings_as_it_was_said(given):
    run = parse_run(RUN.replace("GIVEN", json.dumps(given)))
    assert run.training.regularisers.l2_embedding == given
    assert parse_run(dump_run(run)) == run
    assert parse_run(RUN.replace("GIVEN", "1e-4")).training.regularisers.l2_embedding == 1e-4  # to YAML, a text


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["expert_orthogonality", "gate_balance"])
@pytest.mark.parametrize("trunk", [SharedBottom([6]), SingleTask([6]), MMoE(1, [6])], ids=lambda t: type(t).__name__)
def test_penalties_on_experts_are_refused_where_no_gate_mixes_any(trunk, name):
    with pytest.raises(ConfigError, match=f"regulariser '{name}': the trunk has no gate that mixes several experts"):
        train_module(copy.deepcopy(trunk), {name: 0.1})(batch())


def test_a_trunk_of_ones_own_without_experts_is_refused_when_the_model_is_built():
    class Own(torch.nn.Module):
        out_features = 16

        def forward(self, x, tasks):
            return x.unsqueeze(1).expand(-1, len(tasks), -1)

    with pytest.raises(ValueError, match="regulariser 'gate_balance': the trunk has no gate"):
        train_module(Own(), {"gate_balance": 0.1})
    assert train_module(Own(), {"l2_dense": 0.1, "gate_balance": 0.0})(batch())[0] > 0


def test_unknown_names_and_negative_weights_are_refused():
    with pytest.raises(ValueError, match=r"no regulariser 'l2_embeding' \(did you mean 'l2_embedding'\?\)"):
        Regularisers({"l2_embeding": 1.0})
    with pytest.raises(ValueError, match="at least 0, not -1"):
        Regularisers({"l2_embedding": -1.0})
    with pytest.raises(ValueError, match="'l2_dense' needs the model's tower"):
        Regularisers({"l2_dense": 1.0})
    with pytest.raises(ValueError, match=r"l2_embedding.u': a weight is a number of at least 0, not -1"):
        train_module(MMoE(2, [6]), {"l2_embedding": {"u": -1.0}})
    with pytest.raises(ValueError, match=r"'l2_rows': weights are by feature, such as \{user_id: 0.05\}"):
        train_module(MMoE(2, [6]), {"l2_rows": 0.1})
    with pytest.raises(ConfigError, match="regulariser 'l2_rows': no embedded feature 'v'"):
        train_module(MMoE(2, [6]), {"l2_rows": {"v": 1.0}})
    with pytest.raises(ConfigError, match="regulariser 'l2_embedding': no embedded feature 'v'"):
        train_module(MMoE(2, [6]), {"l2_embedding": {"v": 1.0}})
    with pytest.raises(ValueError, match="'l2_dense': a weight is one number; l2_embedding and l2_rows are by f"):
        train_module(MMoE(2, [6]), {"l2_dense": {"u": 1.0}})
    with pytest.raises(ValueError, match="'l2_embedding' by feature needs the model's lookups"):
        Regularisers({"l2_embedding": {"u": 1.0}})


@pytest.mark.parametrize("name", ["expert_orthogonality", "gate_balance"])
def test_yaml_refuses_penalties_on_experts_of_a_trunk_without_gates(name):
    text = f"""
    data: {{log: a.parquet}}
    schema: {{features: [{{name: u, group: user}}], tasks: [{{name: click, kind: binary}}], time: t}}
    model: {{trunk: {{kind: shared_bottom}}}}
    training: {{regularisers: {{{name}: 0.1}}}}
    """
    with pytest.raises(ConfigError, match=f"training.regularisers.{name}: a shared_bottom trunk has no gate"):
        parse_run(text)
    assert parse_run(text.replace("0.1", "0")).training.regularisers.gate_balance == 0
