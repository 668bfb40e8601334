"""The dot-product head: a formula in plain PyTorch, beside everything that touches a head elsewhere."""

import copy
import math

import pytest
import shop
import torch
from pydantic import ValidationError
from test_export import outputs, untrained
from test_surgery import upgrad
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from mtcl_torchrec import MTCL, PLE, MMoE, MTBatch, MTCLTrain, Schema, SharedBottom, Task
from mtcl_torchrec.config import dump_run, parse_run
from mtcl_torchrec.modules.balance.surgery import GradientSurgery
from mtcl_torchrec.modules.dot_product import vector_names
from mtcl_torchrec.modules.embeddings import with_own_tables
from mtcl_torchrec.modules.gates import EPNet, PPNet
from mtcl_torchrec.modules.regularisers import is_weight
from mtcl_torchrec.modules.towers import Alike
from mtcl_torchrec.modules.trunks import STEM
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.serving.artefact import Artefact
from mtcl_torchrec.serving.export import export_run
from mtcl_torchrec.serving.network import network_inputs, serving_network

GROUPS = {"u": ["user"], "hour": ["context"], "i": ["item"], "ui": ["user", "item"], "ih": ["item", "context"]}
DENSE = [["user"], ["item"], ["user", "context"]]
DOT = {"kind": "dot", "dim": 6, "l2": 0.1}
TASKS = (
    Task.binary("click"),
    Task.binary("rated", head=DOT, negative_rate=0.5),
    Task.binary("back", inputs=("user", "context")),
    Task.regression("stars", head="dot", inputs=("user", "item")),
)


def tables():
    return [EmbeddingBagConfig(name=f"t_{f}", num_embeddings=30, embedding_dim=4, feature_names=[f]) for f in GROUPS]


def model(trunk=None, tasks=TASKS, seed=0, of=None, **options):
    torch.manual_seed(seed)
    collection = EmbeddingBagCollection(tables=tables() if of is None else of)
    torch.manual_seed(seed + 1)
    trunk = MMoE(3, [6]) if trunk is None else trunk
    return MTCL(collection, 3, trunk, tasks, tower_layers=[4], feature_groups=GROUPS, dense_groups=DENSE, **options)


def batch(rows=24, tasks=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 30, (5 * rows,), generator=g)
    labels = torch.randint(0, 2, (rows, tasks), generator=g).float()
    labels[::5, 0] = float("nan")
    features = KeyedJaggedTensor(list(GROUPS), ids, lengths=torch.ones(5 * rows).long())
    return MTBatch(torch.randn(rows, 3, generator=g), features, labels)


def logits_of(of, data):
    return of.tower(data.dense_features, of.embedding_bag_collection(data.sparse_features))


def test_the_logit_is_that_of_matrix_factorisation_over_each_sides_columns():
    of, data = model(), batch()
    pooled = of.embedding_bag_collection(data.sparse_features)
    x, d = {key: pooled[key] for key in GROUPS}, data.dense_features
    logits = logits_of(of, data)
    sides = {  # what is of user and item, or of item and context, is of neither side
        "rated": (torch.cat([x["u"], x["hour"], d[:, [0, 2]]], 1), torch.cat([x["i"], d[:, [1]]], 1), 6),
        "stars": (torch.cat([x["u"], d[:, [0]]], 1), torch.cat([x["i"], d[:, [1]]], 1), 32),  # not the context
    }
    for number, (name, (user, item, dim)) in zip((1, 3), sides.items(), strict=True):
        head = of.tower.dot_heads[str(number)]
        u, v = (user @ head.user.weight.T).detach(), (item @ head.item.weight.T).detach()
        expected = [
            sum(float(u[b, k] * v[b, k]) for k in range(dim)) / math.sqrt(dim) + float(u[b, dim] + v[b, dim])
            for b in range(24)
        ]
        torch.testing.assert_close(logits[name], torch.tensor(expected) + head.bias, atol=1e-5, rtol=1e-5)
    assert of.tower.dot_heads["1"].bias.item() == pytest.approx(math.log(0.5))  # even odds in what its loss sees
    assert set(logits) == {"click", "rated", "back", "stars", *vector_names(TASKS[1])}


def of_kind(kind, name="rated", **options):
    return Task.binary(name, head={**DOT, "kind": kind} if kind != "tower" else "tower", **options)


def test_a_tower_dot_heads_logit_is_the_sum_of_a_towers_and_a_dot_heads():
    tasks = {kind: [TASKS[0], of_kind(kind, negative_rate=0.5)] for kind in ("tower", "dot", "tower_dot")}
    rates, data = {"click": 0.3, "rated": 0.04}, batch(tasks=2)
    both, tower, dot = (model(None, tasks[kind], base_rates=rates) for kind in ("tower_dot", "tower", "dot"))
    assert both.tower.heads[1].bias.item() == tower.tower.heads[1].bias.item() < -2
    assert both.tower.dot_heads["1"].bias.item() == 0  # the sum starts at the base rate, not at its square
    state = both.state_dict()
    tower.load_state_dict({n: p for n, p in state.items() if ".dot_heads." not in n})
    dot.load_state_dict(
        {**dot.state_dict(), **{n: p for n, p in state.items() if "embedding" in n or "dot_heads" in n}}
    )
    of_both, of_tower, of_dot = (logits_of(of, data) for of in (both, tower, dot))
    torch.testing.assert_close(of_both["rated"], of_tower["rated"] + of_dot["rated"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(of_both["click"], of_tower["click"], atol=1e-6, rtol=1e-5)
    for name in vector_names(tasks["dot"][1]):
        torch.testing.assert_close(of_both[name], of_dot[name])
    assert of_dot["rated"].std() > 0.01
    assert of_tower["rated"].std() > 0.01


@pytest.mark.parametrize("chain", ["aitm", "escm2_dr"])
def test_a_chain_that_reads_towers_takes_tower_dot_heads(chain):
    tasks = [of_kind("tower_dot", "click"), of_kind("tower_dot", "buy", after="click", chain=chain)]
    alone, data = [of_kind("tower", t.name, after=t.after, chain=t.chain) if t.after else of_kind("tower", t.name)
                   for t in tasks], batch(tasks=2)  # fmt: skip
    both, towers = model(None, tasks), model(None, alone)
    towers.load_state_dict({n: p for n, p in both.state_dict().items() if ".dot_heads." not in n})
    for number in ("0", "1"):
        for parameter in both.tower.dot_heads[number].parameters():
            parameter.detach().zero_()
    got, expected = logits_of(both, data), logits_of(towers, data)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-6, rtol=1e-5)


FACTORS = Task.binary("rated", head={**DOT, "dim": 4, "factors": ["u", "hour", "i"]}, negative_rate=0.5)


def test_factors_are_added_to_the_vector_of_their_side_as_they_are():
    """⟨d^¼ (p_u + p_hour) + W_U x_U, d^¼ q_i + W_I x_I⟩ / √d, x the other columns; biases are linear in all."""
    of, data = model(None, [FACTORS]), batch(tasks=1)
    bags, head = of.embedding_bag_collection.embedding_bags, of.tower.dot_heads["0"]
    row = {f: bags[f"t_{f}"].weight[data.sparse_features[f].values()].detach() for f in ("u", "hour", "i")}
    d, user, item = data.dense_features, head.user.weight.detach(), head.item.weight.detach()
    p = 2**0.5 * (row["u"] + row["hour"]) + d[:, [0, 2]] @ user[:4, 8:].T
    q = 2**0.5 * row["i"] + d[:, [1]] @ item[:4, 4:].T
    biases = torch.cat([row["u"], row["hour"], d[:, [0, 2]], row["i"], d[:, [1]]], 1) @ torch.cat([user[4], item[4]])
    expected = torch.tensor([float(p[b] @ q[b]) / 2 for b in range(24)]) + biases + head.bias.detach()
    assert not user[:4, :8].any()  # what the maps do not read is nothing
    assert not item[:4, :4].any()
    logits = logits_of(of, data)
    torch.testing.assert_close(logits["rated"].detach(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[vector_names(FACTORS)[1]][:, :4].detach(), q, atol=1e-5, rtol=1e-5)


def test_a_bilinear_form_of_factors_is_each_tasks_own():
    """qᵀ W p by hand; with W = I it is the plain product; W starts near that, and does not decay."""
    head = {"kind": "dot", "dim": 4, "factors": ["u", "i"]}
    of = model(None, [Task.binary(name, head={**head, "bilinear": True}) for name in "ab"])
    data, dots = batch(tasks=2), [of.tower.dot_heads[number] for number in "01"]
    for dot in dots:
        assert 0 < (dot.bilinear - torch.eye(4)).abs().max() < 1
        assert not torch.equal(dot.bilinear, dots[0].bilinear) or dot is dots[0]
        dot.bilinear.detach().copy_(torch.eye(4))
    plain = model(None, [Task.binary(name, head=head) for name in "ab"])
    plain.load_state_dict({n: p for n, p in of.state_dict().items() if not n.endswith("bilinear")})
    for name, value in logits_of(plain, data).items():
        torch.testing.assert_close(logits_of(of, data)[name], value)
    dot, w = dots[1], torch.arange(16.0).view(4, 4) - 6
    dot.bilinear.detach().copy_(w)
    for linear in (dot.user, dot.item):
        linear.weight.detach().zero_()
    bags = of.embedding_bag_collection.embedding_bags
    p, q = (bags[f"t_{f}"].weight[data.sparse_features[f].values()] for f in ("u", "i"))
    expected = torch.stack([q[b] @ w @ p[b] for b in range(24)]) + dot.bias
    torch.testing.assert_close(logits_of(of, data)["b"], expected, atol=1e-5, rtol=1e-5)
    logits_of(of, data)["b"].sum().backward()
    torch.testing.assert_close(dot.bilinear.grad, q.T @ p, atol=1e-5, rtol=1e-4)
    assert not is_weight("tower.dot_heads.1.bilinear")


def test_with_maps_of_zero_it_is_classic_matrix_factorisation_and_learns_as_it_does():
    """Against p_u · q_i + b in plain PyTorch, 20 steps of gradient descent, L2 by feature included."""
    task = Task.binary("rated", head={"kind": "dot", "dim": 4, "factors": ["u", "i"]})
    of, data = model(None, [task]), batch(tasks=1)
    data.labels[:] = torch.where(torch.isnan(data.labels), 1.0, data.labels)
    head, bags = of.tower.dot_heads["0"], of.embedding_bag_collection.embedding_bags
    for linear in (head.user, head.item):
        linear.weight.detach().zero_()
        linear.weight.requires_grad_(False)
    users, items = (bags[f"t_{f}"].weight.detach().clone().requires_grad_() for f in ("u", "i"))
    bias = torch.zeros(1, requires_grad=True)
    train = MTCLTrain(of, regularisers={"l2_embedding": {"u": 0.04, "i": 0.02}})
    ours = torch.optim.SGD([p for p in train.parameters() if p.requires_grad], lr=1.0)
    plain = torch.optim.SGD([users, items, bias], lr=1.0)
    u, i = (data.sparse_features[f].values() for f in ("u", "i"))
    for _ in range(20):
        p, q = users[u], items[i]
        logit = (p * q).sum(1) + bias
        expected = torch.nn.functional.binary_cross_entropy_with_logits(logit, data.labels[:, 0])
        expected = expected + 0.04 * p.square().sum(1).mean() + 0.02 * q.square().sum(1).mean()
        loss, _ = train(data)
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        for optimizer, value in ((ours, loss), (plain, expected)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    torch.testing.assert_close(bags["t_u"].weight, users, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(bags["t_i"].weight, items, atol=1e-4, rtol=1e-3)


def test_factors_of_a_tables_copies_are_those_the_task_may_see():
    head = Task.binary("rated", head={"kind": "dot", "dim": 4, "factors": ["u", "i"]})
    of = model(STEM([6]), [TASKS[0], head], of=with_own_tables(tables(), ["click", "rated"]))
    dot = of.tower.dot_heads["1"]
    assert len(dot.user_factors) == len(dot.item_factors) == 8  # the shared row, and the task's own
    dims = {name: slice(at, at + 4) for at, name in zip(range(0, 60, 4), of.tower.concat.keys, strict=True)}
    seen = set(dot.user_factors.tolist()) | set(dot.item_factors.tolist())
    names = {name for name, columns in dims.items() if columns.start in seen}
    assert names == {"u@t_u", "u@t_u@rated", "i@t_i", "i@t_i@rated"}


def test_trunk_and_towers_are_those_of_the_other_tasks_alone():
    """As if the tasks with a dot head were not there."""
    others = [TASKS[0], TASKS[2]]
    for trunk in (lambda: PLE(1, 1, [6], levels=2), lambda: SharedBottom([5])):
        whole, alone, data = model(trunk()), model(trunk(), others), batch()
        alone.load_state_dict({n.replace("heads.2", "heads.1"): p for n, p in whole.state_dict().items()
                               if ".dot_heads." not in n})  # fmt: skip
        got, expected = logits_of(whole, data), logits_of(alone, data)
        for task in others:
            torch.testing.assert_close(got[task.name], expected[task.name])


def test_tasks_with_a_dot_head_alone_need_no_trunk_and_options_that_do_nothing_are_refused():
    of = model(MMoE(3, [6]), [TASKS[1], TASKS[3]])
    assert all(".dot_heads." in name or "embedding_bags" in name for name, _ in of.named_parameters())
    assert logits_of(of, batch())["stars"].shape == (24,)
    with pytest.raises(ConfigError, match=r"every task has a dot head, which reads the embeddings themselves: epnet"):
        model(None, [TASKS[1]], epnet=EPNet(["hour"]))
    text = shop.RUN.split("  tasks:")[0] + "  tasks: [{name: click, kind: binary, head: dot}]\n"
    with pytest.raises(ConfigError, match=r"model.cross_layers: every task has a dot head"):
        parse_run(text + "model: {cross_layers: 2}")
    run = parse_run(text + "model: {embedding_dropout: 0.1}")
    assert parse_run(dump_run(run)).data_schema.tasks == run.data_schema.tasks


def test_own_tables_of_other_tasks_are_none_of_its_business():
    of = model(STEM([6]), of=with_own_tables(tables(), ["click", "rated"]))
    logits_of(of, batch())["rated"].sum().backward()
    moved = {n.split(".")[-2] for n, p in of.named_parameters() if "embedding_bags" in n and p.grad is not None
             and p.grad.abs().sum() > 0}  # fmt: skip
    assert moved == {"t_u", "t_hour", "t_i", "t_u@rated", "t_hour@rated", "t_i@rated"}


@pytest.mark.parametrize("gates", [{}, {"ppnet": True, "epnet": True}])
def test_the_users_vector_is_computed_once_for_each_kind_of_rows(gates):
    options = {"ppnet": PPNet(["u"]), "epnet": EPNet(["hour"])} if gates else {}
    of, data = model(**options).eval(), batch(6)
    of_row, first = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 2, 5])
    pooled = of.embedding_bag_collection(data.sparse_features)
    same = {key: pooled[key][first][of_row] if "item" not in GROUPS[key] else pooled[key] for key in GROUPS}
    dense = data.dense_features.clone()
    dense[:, [0, 2]] = dense[first][of_row][:, [0, 2]]
    seen = []
    of.tower.dot_heads["1"].user.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    once = of.tower(dense, torch.cat(list(same.values()), 1), alike=Alike(of_row, first))
    for name, value in of.tower(dense, torch.cat(list(same.values()), 1)).items():
        torch.testing.assert_close(once[name], value)
    assert seen == [3, 6]
    assert of.tower.has_views_of_the_request


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "dott"}, r"task 'a': no head 'dott' \(did you mean 'dot'\?\); there are tower, dot, tower_dot"),
        ({"head": {"kind": "tower", "dim": 8}}, "dim belongs to head dot, not to tower"),
        ({"head": "dot", "inputs": ["user", "context"]}, r"task 'a': head dot needs inputs of the item"),
        ({"head": {"kind": "dot", "dims": 8}}, "dims"),
        ({"head": {"kind": "dot", "l2": -1}}, "greater than or equal to 0"),
        ({"head": "dot", "after": "b", "chain": "aitm"}, "task 'a': chain aitm reads a tower, and head dot has none"),
        ({"head": "dot", "after": "b", "chain": "escm2_dr"}, "task 'a': chain escm2_dr reads a tower"),
        ({"head": {"kind": "dot", "sampled_softmax": {"temperature": 0}}}, "greater than 0"),
        ({"head": {"kind": "tower", "factors": ["u"]}}, "factors belongs to head dot, not to tower"),
        ({"head": {"kind": "dot", "bilinear": True}}, "bilinear needs factors"),
        ({"kind": "multiclass", "num_classes": 3, "head": "dot"}, "task 'a': head dot gives one logit"),
        ({"kind": "multiclass", "num_classes": 3, "head": "tower_dot"}, "task 'a': head tower_dot gives one logit"),
        ({"head": "tower_dot", "inputs": ["user"]}, "task 'a': head tower_dot needs inputs of the item"),
        ({"kind": "regression", "head": {"kind": "dot", "sampled_softmax": {}}}, "belongs to binary tasks"),
    ],
)
def test_what_does_not_fit_a_dot_head_is_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        Task(**{"name": "a", "kind": "binary", **options})


def test_what_does_not_fit_the_model_is_refused():
    with pytest.raises(ValidationError, match="after: aitm reads the tower of 'b', and head dot has none"):
        Schema(features=[{"name": "u", "group": "user"}], tasks=[
            Task.binary("b", head="dot"), Task.binary("a", after="b", chain="aitm")])  # fmt: skip
    features = [
        {"name": "u", "group": "user", "embedding_dim": 8},
        {"name": "n", "group": "item", "kind": "dense"},
    ]
    for factors, message in (
        (["uu"], r"task 'a': head.factors: no feature 'uu' that has embeddings \(did you mean 'u'\?\)"),
        (["n"], "no feature 'n' that has embeddings"),
        (["u"], "head.factors: 'u' has embedding_dim 8, and the head dim 32; make them equal"),
        (["u", "u"], "head.factors of task 'a': 'u' is declared twice"),
    ):
        with pytest.raises(ValidationError, match=message):
            Schema(features=features, tasks=[Task.binary("a", head={"kind": "dot", "factors": factors})])
    for name, dim, message in (
        ("ui", 4, "'ui' is no feature that its user's or item's vector reads"),
        ("u", 8, "'u' has embeddings of width 4, and the head dim 8"),
    ):
        with pytest.raises(ConfigError, match=f"task 'a': head.factors: {message}"):
            model(None, [Task.binary("a", head={"kind": "dot", "dim": dim, "factors": [name]})])
    dot = [Task.binary("a", head="dot")]
    collection = EmbeddingBagCollection(tables=tables())
    with pytest.raises(ConfigError, match=r"task 'a': head dot tells .* feature_groups must name the group of 'u'"):
        MTCL(collection, 0, SharedBottom([4]), dot)
    with pytest.raises(ConfigError, match="dense_groups must name the groups of each dense column"):
        MTCL(collection, 1, SharedBottom([4]), dot, feature_groups=GROUPS)
    with pytest.raises(ConfigError, match="task 'a': head dot sees no column of the item"):
        MTCL(collection, 0, SharedBottom([4]), dot, feature_groups={**GROUPS, "i": ["user"]})


# ---------------------------------------------------------------------- what touches a head elsewhere


def gradients_of_tasks(train, data):
    """(T, ...) by parameter: each task's gradient alone, and of the pooled embeddings under ""."""
    found = {}
    for number in range(len(train.model.tasks)):
        one = copy.deepcopy(train)
        one.surgery = None
        one.loss.task_weights.zero_()[number] = 1.0
        met = []
        one.model.embedding_bag_collection.register_forward_hook(lambda *of, met=met: met.append(of[2].values()))
        one.model.embedding_bag_collection.register_forward_hook(lambda *of: of[2].values().retain_grad())
        one(data)[0].backward()
        found.setdefault("", []).append(met[0].grad)
        for name, parameter in one.named_parameters():
            found.setdefault(name, []).append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return {name: torch.stack(of).double() for name, of in found.items()}


@pytest.mark.parametrize("kind", ["dot", "tower_dot"])
@pytest.mark.parametrize("cut", ["trunk", "embeddings", "both", "tables"])
def test_gradient_surgery_cuts_a_dot_heads_gradient_like_a_towers(cut, kind):
    data = batch(40)
    data.labels[:, 3] = torch.where(torch.arange(40) % 4 != 0, 1 - data.labels[:, 1], data.labels[:, 1])
    tasks = [TASKS[0], of_kind(kind), TASKS[2], of_kind(kind, "hidden")]
    surgery = GradientSurgery("upgrad", cut=cut, min_weight=0.0, max_weight=100.0)
    train = MTCLTrain(model(MMoE(3, [6]), tasks), gradient_surgery=surgery)
    heads = train.model.tower.dot_heads  # two that see the world alike, and whose labels say the opposite
    heads["3"].load_state_dict(heads["1"].state_dict())
    alone = gradients_of_tasks(train, data)
    train(data)[0].backward()
    weights = train.surgery.newest_weights
    of_tables, of_trunk = weights[-1], weights[0] if cut != "embeddings" else torch.ones(4).double()
    for name, parameter in train.named_parameters():
        below = of_tables if "embedding_bags" in name else of_trunk if ".experts." in name else torch.ones(4).double()
        expected = torch.tensordot(below, alone[name], 1)
        got = torch.zeros_like(expected) if parameter.grad is None else parameter.grad.double()
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    assert (weights > 1.001).any(1).all(), "some tasks are in conflict"
    if cut in ("embeddings", "both"):
        torch.testing.assert_close(of_tables, upgrad(alone[""].flatten(1)), atol=1e-4, rtol=1e-3)


def test_a_frozen_dot_head_goes_on_and_moves_nothing_that_is_shared():
    train, data = MTCLTrain(model()), batch()
    alone = gradients_of_tasks(train, data)
    train.loss.freeze("rated")
    train(data)[0].backward()
    for name, parameter in train.named_parameters():
        kept = alone[name].sum(0) if ".dot_heads." in name else alone[name][[0, 2, 3]].sum(0)
        got = torch.zeros_like(kept) if parameter.grad is None else parameter.grad.double()
        torch.testing.assert_close(got, kept, atol=1e-7, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert alone["model.tower.dot_heads.1.user.weight"][1].any()


def test_its_l2_is_the_mean_square_of_vectors_and_biases_and_all_of_it_is_in_l2_dense():
    data = batch()
    data.labels[3:6, 1] = float("nan")
    of = model()
    without = MTCLTrain(copy.deepcopy(of), seed=1).eval()
    without.loss.dot_losses.weights = tuple((i, 0.0) for i, _ in without.loss.dot_losses.weights)
    train = MTCLTrain(of, seed=1).eval()  # negatives weigh their rate in evaluation
    train(data), without(data)
    u, v = (logits_of(of, data)[name] for name in vector_names(TASKS[1]))
    known = ~torch.isnan(data.labels[:, 1])
    weight = torch.where(data.labels[:, 1] == 1, 1.0, 0.5)[known]
    squares = (u.square().sum(1) + v.square().sum(1))[known]
    added = train.loss.last_task_losses - without.loss.last_task_losses
    torch.testing.assert_close(added[1], 0.1 * (weight * squares).sum() / weight.sum(), atol=1e-6, rtol=1e-4)
    assert added[[0, 2, 3]].abs().max() == 0
    dense = MTCLTrain(model(None, TASKS[1:2] + TASKS[3:]), regularisers={"l2_dense": 1.0})
    with_it, bare = dense(batch(tasks=2))[0], MTCLTrain(copy.deepcopy(dense.model))(batch(tasks=2))[0]
    weights = sum(p.square().sum() for n, p in dense.model.tower.named_parameters() if n.endswith("weight"))
    torch.testing.assert_close(with_it - bare, weights, atol=1e-5, rtol=1e-4)


def test_in_bf16_logits_are_float32_and_close():
    data, full = batch(), model().eval()
    half = model(precision="bf16").eval()
    half.load_state_dict(full.state_dict())
    exact, rounded = logits_of(full, data), logits_of(half, data)
    for name in exact:
        assert rounded[name].dtype == torch.float32
        assert (rounded[name] - exact[name]).abs().max() < 0.03 * exact[name].abs().max().clamp(min=1), name


RUN = """
data: {log: log.parquet}
schema:
  user: user_id
  item: product_id
  time: time
  features:
    - {name: user_id, group: user, embedding_dim: 8}
    - {name: product_id, group: item, embedding_dim: 8}
    - {name: hour, group: context, embedding_dim: 4}
    - {name: price, group: item, kind: dense}
  tasks:
    - {name: click, kind: binary}
    - {name: buy, kind: binary, after: click, head: {kind: dot, dim: 8, l2: 1e-3, factors: [user_id, product_id]}}
    - {name: stars, kind: regression, head: dot, mask: buy}
    - {name: again, kind: binary, label: click,
       head: {kind: tower_dot, dim: 8, factors: [user_id, product_id], bilinear: true}}
model: {trunk: {kind: shared_bottom, expert_layers: [8]}, tower_layers: []}
calibration: platt
fusion: {weights: {click: 1, buy: 3, stars: 0.5}}
"""


@pytest.fixture(scope="module")
def run():
    return untrained(RUN)


def test_a_dot_head_behind_a_chain_and_beside_others_is_exported(run, tmp_path):
    rows = run.encode(shop.log(900, seed=1).tail(40))
    expected = outputs(run, rows)
    assert {"buy", "buy|click", "stars", "again", "score"} <= set(expected)
    made = export_run(run, tmp_path / "dot.mtcl", compiled="no")
    artefact = Artefact.load(made.path)
    got = artefact.network(**network_inputs(rows, artefact.features, artefact.inputs))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-5)
    assert "alike" in serving_network(run.model).inputs
