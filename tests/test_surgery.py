"""Gradient surgery does what K separate backward passes in plain PyTorch with TorchJD's weights would do."""

import copy
import gc

import pytest
import torch
from test_distributed import TRUNKS, rows
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchjd import aggregation
from torchjd.linalg import QuadprogProjector
from torchrec.modules.crossnet import LowRankCrossNet
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mtcl_torchrec import MTCL, STEM, AdaTT, HoME, MTCLTrain, Task
from mtcl_torchrec.data.batch import global_batches, iterate
from mtcl_torchrec.modules.balance.gramian import gramian
from mtcl_torchrec.modules.balance.surgery import GradientSurgery
from mtcl_torchrec.modules.balance.tables import table_gramian, table_lookups
from mtcl_torchrec.modules.embeddings import embedding_dims, with_own_tables
from mtcl_torchrec.modules.gates import PPNet
from mtcl_torchrec.modules.heads import loss_per_row
from mtcl_torchrec.modules.trunks import Shared
from mtcl_torchrec.schema import ConfigError

GROUPS = {"user": ["user"], "item": ["item"], "last_item": ["item"], "tags": ["item"], "words": ["context"]}


def tasks(restricted=False):
    inputs = {"inputs": ("user", "context")} if restricted else {}
    return [Task.binary("click"), Task.binary("rare", weight=3.0), Task.regression("seconds", **inputs)]


MORE_TRUNKS = {
    "adatt": lambda: AdaTT([6, 4], task_experts=2, shared_experts=1),
    "home": lambda: HoME([6, 4], groups=[["click", "rare"], ["seconds"]], task_experts=2, feature_rank=2),
    "stem": lambda: STEM([6, 4], levels=2),
}


def model(trunk="mmoe", restricted=False, interaction=True):
    def table(name, size, dim, pooling, *features):
        return EmbeddingBagConfig(
            name=name, num_embeddings=size, embedding_dim=dim, feature_names=list(features), pooling=pooling
        )

    torch.manual_seed(7)
    tables = [
        table("t_users", 203, 8, PoolingType.SUM, "user"),
        table("t_items", 30, 8, PoolingType.SUM, "item", "last_item"),
        table("t_tags", 50, 12, PoolingType.MEAN, "tags"),
        table("t_words", 40, 4, PoolingType.SUM, "words"),
    ]
    if trunk == "stem":
        tables = with_own_tables(tables, tasks())
    made = MTCL(
        EmbeddingBagCollection(tables=tables),
        2,
        (TRUNKS | MORE_TRUNKS)[trunk]() if isinstance(trunk, str) else trunk,
        tasks(restricted),
        interaction=(lambda width: LowRankCrossNet(width, 1, low_rank=4)) if interaction and trunk != "stem" else None,
        tower_layers=[4],
        feature_groups=GROUPS,
        dense_groups=[["user"], ["item"]],
    )
    with torch.no_grad():  # two tasks that see the world alike, and whose labels say the opposite
        gates = next((level.gate_weight for level in made.tower.expert_levels()[-1:]), None)
        for of in (*made.tower.towers.parameters(), made.tower.heads, gates):
            if isinstance(of, nn.ModuleList):
                of[1].load_state_dict(of[0].state_dict())
            elif of is not None:
                of[1] = of[0]
    return made


def batch(number=0, size=32):
    """Mostly, the first label is 1 and the second is 0."""
    found = list(iterate(rows(), global_batches(90, size, seed=(3, 1))))[number]
    opposite = torch.arange(len(found.labels)) % 4 != 0
    found.labels[opposite, 0], found.labels[opposite, 1] = 1.0, 0.0
    return found


class Plain:
    """One forward pass in plain PyTorch, and K backward passes."""

    def __init__(self, of, batch):
        tower, self.model, self.batch = of.tower, of, batch
        pooled = of.embedding_bag_collection(batch.sparse_features)
        self.embeddings = torch.cat([pooled[key] for key in tower.concat.keys], 1)
        x = tower.concat(batch.dense_features, self.embeddings)
        self.views, self.shared = {}, []
        for number, task in enumerate(of.tasks):
            self.views.setdefault(task.inputs, []).append(number)
        for numbers in self.views.values():
            seen = x if tower._sees_all else x * getattr(tower, tower._views[len(self.shared)][0])
            self.shared.append(tower.trunk.shared(tower.interaction(seen), numbers))
        self.losses = self.losses_of(self.shared)

    def losses_of(self, shared):
        tower, representations, losses = self.model.tower, {}, []
        for of_view, numbers in zip(shared, self.views.values(), strict=True):
            out = tower.trunk.split(of_view, numbers)
            representations |= {number: out[:, place] for place, number in enumerate(numbers)}
        h = tower.towers(torch.stack([representations[i] for i in range(len(self.model.tasks))]))
        for i, task in enumerate(self.model.tasks):
            label = self.batch.labels[:, i]
            present = ~torch.isnan(label)
            weights = torch.where(present, self.batch.weights[:, i], 0.0)
            each = loss_per_row(task, tower.heads[i](h[i]).squeeze(1), torch.where(present, label, 0.0))
            losses.append(task.weight * (weights * each).sum() / weights.sum().clamp(min=1e-9))
        return losses

    def shared_gradients(self):
        """Of what is shared, each tensor for itself: none is a function of another."""
        leaves = [Shared(*(tuple(t.detach().requires_grad_() for t in part) for part in s)) for s in self.shared]
        return self.gradients([t for s in leaves for t in (*s.common, *s.own)], self.losses_of(leaves))

    def gradients(self, of, losses=None):
        """(K, everything in `of`): each task's gradient, flattened."""
        found = []
        for loss in losses or self.losses:
            grads = torch.autograd.grad(loss, of, retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(t) if g is None else g for t, g in zip(of, grads, strict=True)]
            found.append(torch.cat([p.flatten() for p in parts]).double())
        return torch.stack(found)

    def gradients_of_parameters(self, tables):
        """(K, ...): of tables and of what tasks share of the dense parameters below the place where they part."""
        tower, of = self.model.tower, dict(self.model.named_parameters())
        found = [self.gradients([of[name] for name in tables])]
        for parameter, indices in [
            *((p, None) for p in tower.interaction.parameters()),
            *tower.trunk.shared_parameters(),
        ]:
            gradient = self.gradients([parameter]).view(-1, *parameter.shape)
            found.append((gradient if indices is None else gradient[:, indices]).flatten(1))
        return torch.cat(found, dim=1)

    def parameters(self):
        """Names of tables, of dense parameters below the place where the tasks part, and of those above it."""
        names = dict(self.model.named_parameters())
        tensors = [t for shared in self.shared for t in (*shared.common, *shared.own) if t.requires_grad]
        total = sum(t.sum() for t in tensors)
        reached = torch.autograd.grad(total, list(names.values()), retain_graph=True, allow_unused=True)
        below = [n for n, g in zip(names, reached, strict=True) if g is not None]
        tables = [n for n in below if "embedding_bags" in n]
        return tables, [n for n in below if n not in tables], [n for n in names if n not in below]


def upgrad(jacobian):
    """TorchJD's weights, which are divided by the number of tasks."""
    g = jacobian @ jacobian.T
    return len(g) * aggregation.UPGradWeighting(projector=QuadprogProjector(norm_eps=0.0))(g)


def expected(plain, cut, group_columns=None):
    """Weights of each Gramian, and the gradient of every parameter."""
    tables, below, above = plain.parameters()
    of = dict(plain.model.named_parameters())
    ones = torch.ones(len(plain.losses), dtype=torch.float64)
    weights = {}
    if cut in ("trunk", "both"):
        weights["trunk"] = upgrad(plain.shared_gradients())
    if cut in ("embeddings", "both"):
        weights["embeddings"] = upgrad(plain.gradients([plain.embeddings]))
    if cut == "tables":
        weights["tables"] = upgrad(plain.gradients_of_parameters(tables))
    of_tables = weights.get("embeddings", weights.get("trunk", weights.get("tables")))
    of_below = weights.get("trunk", weights.get("tables", ones))
    gradients = {}
    for names, w in ((tables, of_tables), (below, of_below), (above, ones)):
        for name in names:
            gradients[name] = (w @ plain.gradients([of[name]])).view_as(of[name]).float()
    return weights, gradients


def close(actual, wanted, message, tolerance=1e-6):
    scale = wanted.abs().max().clamp(min=1e-12)
    torch.testing.assert_close(
        actual / scale, wanted / scale, atol=tolerance, rtol=tolerance, msg=lambda m: f"{message}: {m}"
    )


@pytest.mark.parametrize("cut", ["trunk", "embeddings", "both", "tables"])
@pytest.mark.parametrize(
    ("trunk", "restricted"),
    [
        ("mmoe", False),
        ("mmoe", True),
        ("ple", False),
        ("shared_bottom", True),
        ("adatt", False),
        ("home", True),
        ("stem", False),
    ],
)
def test_weights_and_all_gradients_are_those_of_torchjd_and_separate_backward_passes(trunk, restricted, cut):
    plain = Plain(model(trunk, restricted), batch())
    weights, gradients = expected(plain, cut)
    train = MTCLTrain(
        model(trunk, restricted), gradient_surgery=GradientSurgery("upgrad", cut=cut, min_weight=0, max_weight=1e9)
    )
    loss, _ = train(batch())
    torch.testing.assert_close(loss, sum(plain.losses))
    loss.backward()
    for row, wanted in zip(train.surgery.newest_weights, weights.values(), strict=True):
        torch.testing.assert_close(row, wanted, atol=1e-6, rtol=1e-6)
        assert (row - 1).abs().max() > 1e-3, "nothing to see: no conflict"
    for name, parameter in train.model.named_parameters():
        close(parameter.grad, gradients[name], name, 3e-6 if trunk == "stem" else 1e-6)


def surgical(kind="upgrad", trunk="mmoe", restricted=False, **options):
    return MTCLTrain(model(trunk, restricted), gradient_surgery=GradientSurgery(kind, **options))


def gradients_of(train, data=None):
    train.zero_grad()
    train(data or batch())[0].backward()
    return {name: p.grad.clone() for name, p in train.model.named_parameters()}


def test_groups_of_features_have_weights_of_their_own():
    groups = [["item", "user"], ["words"]]  # the last column and the first, in an order of their own; tags are the rest
    plain = Plain(model(), batch())
    jacobian = plain.gradients([plain.embeddings]).view(3, 32, -1)
    columns, at = {}, 0
    for key, width in zip(plain.model.tower.concat.keys, [8, 8, 8, 12, 4], strict=True):
        columns[key], at = range(at, at + width), at + width
    wanted = {}
    for group in (["user", "item"], ["words"], ["last_item", "tags"]):
        weights = upgrad(jacobian[:, :, [c for key in group for c in columns[key]]].flatten(1))
        wanted |= dict.fromkeys(group, weights)
    train = surgical(cut="embeddings", groups=groups, min_weight=0, max_weight=1e9)
    found = gradients_of(train)
    assert [p.name for p in train.surgery.statistics().parts] == ["item, user", "words", "last_item, tags"]
    torch.testing.assert_close(train.surgery.newest_weights[0], wanted["user"], atol=1e-6, rtol=1e-6)
    assert (wanted["user"] - wanted["words"]).abs().max() > 1e-3
    of = dict(plain.model.named_parameters())
    for table, feature in {"t_users": "user", "t_tags": "tags", "t_words": "words"}.items():
        name = f"embedding_bag_collection.embedding_bags.{table}.weight"
        close(found[name], (wanted[feature] @ plain.gradients([of[name]])).view_as(of[name]).float(), table)


@pytest.mark.parametrize("cut", ["trunk", "embeddings", "both", "tables"])
def test_measuring_changes_nothing(cut):
    off, on = (
        gradients_of(MTCLTrain(model("ple", restricted=True))),
        gradients_of(surgical("measure", "ple", restricted=True, cut=cut)),
    )
    for name, value in off.items():
        close(on[name], value, name)


def nodes(loss):
    """The kinds of all nodes of a graph, in the order in which they are met."""
    kinds, seen, left = [], set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            kinds.append(type(node).__name__)
            left += [below for below, _ in node.next_functions]
    return kinds


def test_without_surgery_and_in_evaluation_the_graph_is_what_it_was():
    off, on = MTCLTrain(model()), surgical(cut="both")
    names = ("_ForkNodeBackward", "_HandOverBackward")
    plain = nodes(off(batch())[0])
    assert [name for name in names if name in nodes(on(batch())[0])] == list(names)
    assert not set(names) & set(plain)
    on.eval()
    off.eval()
    assert nodes(on(batch())[0]) == nodes(off(batch())[0])
    before = on.surgery.statistics().steps
    with torch.no_grad():
        on.train()(batch())
    assert on.surgery.statistics().steps == before == 0


@pytest.mark.parametrize("trunk", ["mmoe", "ple"])
@pytest.mark.parametrize("penalty", [{"l2_embedding": 0.5}, {"expert_orthogonality": 2.0}, {"gate_balance": 5.0}])
def test_a_penalty_goes_past_the_surgery(penalty, trunk):
    def penalised(surgery):
        return MTCLTrain(model(trunk), regularisers=penalty, gradient_surgery=surgery)

    name = "embedding_bag_collection.embedding_bags.t_users.weight"
    alone = gradients_of(penalised(None))[name] - gradients_of(MTCLTrain(model(trunk)))[name]
    for cut in ("trunk", "embeddings", "both"):
        without, train = surgical(cut=cut, trunk=trunk), penalised(GradientSurgery("upgrad", cut=cut))
        with_surgery = gradients_of(train)[name] - gradients_of(without)[name]
        torch.testing.assert_close(with_surgery, alone, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(train.surgery.newest_weights, without.surgery.newest_weights)


@pytest.mark.parametrize("penalty", ["expert_orthogonality", "gate_balance"])
@pytest.mark.parametrize("kind", ["mgda", "nash_mtl", "db_mtl"])
def test_a_penalty_is_no_gradient_of_a_task_that_is_frozen_or_has_no_labels(kind, penalty):
    unlabelled = batch()
    unlabelled.labels[:, 2] = float("nan")
    for data, frozen in ((batch(), ("seconds",)), (unlabelled, ())):
        trains = [
            MTCLTrain(model(), regularisers=given, gradient_surgery=GradientSurgery(kind))
            for given in ({}, {penalty: 1e-4})
        ]
        for train in trains:
            train.loss.freeze(*frozen)
            gradients_of(train, data)
        without, penalised = (train.surgery.newest_weights[0] for train in trains)
        torch.testing.assert_close(penalised, without, atol=1e-3, rtol=1e-3)
        assert trains[1].surgery.statistics().parts[0].active == [1, 1, 0]


def test_a_group_holds_the_tasks_own_tables_of_its_features():
    train = surgical("measure", "stem", cut="embeddings", groups=[["user"]])
    gradients_of(train)
    plain = Plain(model("stem"), batch())
    jacobian, columns, at = plain.gradients([plain.embeddings]).view(3, 32, -1), [], 0
    for key, width in embedding_dims(plain.model.embedding_bag_collection).items():
        columns += range(at, at + width) if key.startswith("user") else []
        at += width
    found = train.surgery.statistics().parts
    assert [part.name for part in found] == ["user", "item, last_item, tags, words"]
    of_user = jacobian[:, :, columns].flatten(1)
    wanted = of_user / of_user.norm(dim=1, keepdim=True)
    torch.testing.assert_close(torch.tensor(found[0].cosine).double(), (wanted @ wanted.T).double(), atol=1e-6, rtol=0)


KINDS_THAT_COULD_DIVIDE_BY_ZERO = ["upgrad", "mgda", "imtl_g", "cagrad", "nash_mtl", "gradvac", "gradnorm", "db_mtl"]


@pytest.mark.parametrize("cut", ["trunk", "tables"])
@pytest.mark.parametrize("kind", KINDS_THAT_COULD_DIVIDE_BY_ZERO)
def test_a_task_without_labels_is_left_out(kind, cut):
    data = batch()
    data.labels[:, 1] = float("nan")
    train = surgical(kind, cut=cut)
    found = gradients_of(train, data)
    weights = train.surgery.newest_weights[0]
    assert weights[1] == 1
    two = MTCLTrain(model(), gradient_surgery=GradientSurgery("measure", cut=cut))
    gradients_of(two, data)
    assert all(torch.isfinite(g).all() for g in found.values())
    part = train.surgery.statistics().parts[0]
    assert part.active == [1, 0, 1]
    assert part.degenerate == 0
    assert part.cosine[0][1] != part.cosine[0][1]  # NaN: never seen together
    assert -1 <= part.cosine[0][2] <= 1
    if kind == "mgda":
        assert weights[0] + weights[2] == pytest.approx(2)


def test_a_frozen_head_and_a_weight_of_zero_leave_a_task_out():
    of = model()
    of.tower.heads[0].weight.data.zero_()  # nothing comes back through it
    train = MTCLTrain(of, gradient_surgery=GradientSurgery("mgda"))
    gradients_of(train)
    assert train.surgery.newest_weights[0, 0] == 1
    train = surgical("mgda")
    train.loss.task_weights[2] = 0.0
    gradients_of(train)
    assert train.surgery.newest_weights[0, 2] == 1
    assert train.surgery.statistics().parts[0].active == [1, 1, 0]


@pytest.mark.parametrize("cut", ["trunk", "embeddings", "both", "tables"])
@pytest.mark.parametrize("kind", ["upgrad", "imtl_g", "gradvac", "gradnorm"])
def test_without_any_gradient_or_with_one_that_is_not_finite_all_weights_are_one_and_it_is_counted(kind, cut):
    train = surgical(kind, cut=cut)
    nothing, poison = batch(), batch()
    nothing.labels[:] = float("nan")
    poison.dense_features[3, 0] = float("nan")  # the guard stops the step, but activations are not finite
    state = {n: b.clone() for n, b in train.surgery.solvers.named_buffers() if not n.endswith("step")}
    for data in (nothing, poison):
        found = gradients_of(train, data)
        assert (train.surgery.newest_weights == 1).all()
        for name, value in found.items():
            if "embedding_bags" in name:
                assert (value == 0).all(), name
    for part in train.surgery.statistics().parts:
        assert part.degenerate == 2
        assert part.clamped == 0
        assert part.active == [0, 0, 0]
    for name, before in state.items():
        assert torch.equal(dict(train.surgery.solvers.named_buffers())[name], before), name
    gradients_of(train)
    assert train.surgery.statistics().parts[-1].degenerate == 2


class Fixed(nn.Module):
    def __init__(self, *weights):
        super().__init__()
        self.weights = torch.tensor(weights)

    def forward(self, gramian):
        if self.weights.isnan().all():
            raise ValueError("no solution")
        return self.weights


def test_weights_are_scaled_clamped_and_counted():
    train = surgical(Fixed(0.0, 1.0, 2.0))
    gradients_of(train)
    assert train.surgery.newest_weights[0].tolist() == [0.1, 1, 2]
    part = train.surgery.statistics().parts[0]
    assert part.clamped == 1
    assert part.weights == pytest.approx([0.1, 1, 2])
    train = surgical(Fixed(1.0, 1.0, 1000.0), max_weight=2.5)
    gradients_of(train)
    assert train.surgery.newest_weights[0].tolist() == [0.1, 0.1, 2.5]
    for weights in ((-1.0, 0.5, 0.1), (float("nan"),) * 3, (float("inf"), 1.0, 1.0), (0.0, 0.0, 0.0)):
        train = surgical(Fixed(*weights))
        gradients_of(train)
        assert train.surgery.newest_weights[0].tolist() == [1, 1, 1], weights
        assert train.surgery.statistics().parts[0].degenerate == 1


@pytest.mark.parametrize("factor", [1e-3, 1e3])
@pytest.mark.parametrize("kind", ["upgrad", "mgda", "imtl_g", "cagrad", "gradnorm", "db_mtl"])
def test_the_scale_of_the_loss_does_not_change_the_weights(kind, factor):
    weights = []
    for scale in (1.0, factor):
        train = surgical(kind, min_weight=0)
        train.loss.task_weights *= scale
        for number in (0, 1):
            gradients_of(train, batch(number))
        weights.append(train.surgery.newest_weights)
    torch.testing.assert_close(*weights, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cut", ["trunk", "embeddings", "tables"])
@pytest.mark.parametrize("kind", ["upgrad", "mgda"])
def test_no_loss_rises_to_first_order_where_the_plain_sum_raises_one(kind, cut):
    """What is at the cut moves against the combined gradient."""
    data = batch()
    plain = Plain(model(), data)
    tables, below, _ = plain.parameters()
    of = dict(plain.model.named_parameters())
    jacobian = {
        "trunk": plain.shared_gradients,
        "embeddings": lambda: plain.gradients([plain.embeddings]),
        "tables": lambda: plain.gradients([of[n] for n in (*tables, *below)]),
    }[cut]()
    train = surgical(kind, cut=cut, min_weight=0, max_weight=1e9)
    gradients_of(train, data)
    change = jacobian @ (train.surgery.newest_weights[0] @ jacobian)
    of_sum = jacobian @ jacobian.sum(0)
    assert of_sum.min() < 0
    assert change.min() > -0.02 * change.abs().max()
    assert change.min() > of_sum.min() / 4


class OwnTrunk(nn.Module):
    out_features = 8

    def build(self, in_features, num_tasks):
        self.layer = nn.Linear(in_features, self.out_features)
        self.unused = nn.Linear(3, 3)

    def forward(self, x, tasks):
        return torch.stack([self.layer(x).relu()] * len(tasks), dim=1)

    def shared_parameters(self):
        return [(parameter, None) for parameter in self.layer.parameters()]


def test_a_trunk_of_ones_own_is_cut_at_the_embeddings_or_the_tables():
    with pytest.raises(ConfigError, match=r"OwnTrunk does not say what its tasks share .* take 'embeddings'"):
        surgical(trunk=OwnTrunk())
    gated = MTCL(model().embedding_bag_collection, 2, OwnTrunk(), tasks(), ppnet=PPNet(["user"]))
    with pytest.raises(ConfigError, match="OwnTrunk does not say what its tasks share"):
        MTCLTrain(gated, gradient_surgery=GradientSurgery())
    for cut in ("embeddings", "tables"):
        train = surgical(trunk=OwnTrunk(), cut=cut, min_weight=0, max_weight=1e9)
        loss, _ = train(batch())
        loss.backward()
        plain = Plain.__new__(Plain)
        plain.losses = None
        reference = MTCLTrain(model(OwnTrunk()))
        jacobian = []
        for i in range(3):
            reference.loss.task_weights[:] = 0.0
            reference.loss.task_weights[i] = [1.0, 3.0, 1.0][i]
            jacobian.append(gradients_maybe(reference))
        tables = [n for n in jacobian[0] if "embedding_bags" in n]
        shared = [*tables, *(n for n in jacobian[0] if "interaction" in n or ".layer." in n)]
        if cut == "tables":
            weights = upgrad(torch.stack([torch.cat([of[n].flatten() for n in shared]).double() for of in jacobian]))
            torch.testing.assert_close(train.surgery.newest_weights[0], weights, atol=1e-6, rtol=1e-6)
        weights = train.surgery.newest_weights[0]
        assert (weights - 1).abs().max() > 1e-3
        for name in shared:
            w = weights if cut == "tables" or name in tables else torch.ones(3)
            wanted = sum(float(w[i]) * jacobian[i][name] for i in range(3))
            close(dict(train.model.named_parameters())[name].grad, wanted, name)


def gradients_maybe(train):
    train.zero_grad()
    train(batch())[0].backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in train.model.named_parameters()}


def test_two_forwards_before_their_backwards_do_not_mix():
    one, other = batch(0), batch(1)
    train = surgical("db_mtl", cut="both")
    wanted = [gradients_of(surgical("db_mtl", cut="both"), data) for data in (one, other)]
    first, second = train(one)[0], train(other)[0]
    fresh = copy.deepcopy(train.surgery.state_dict())
    for loss, of in ((second, wanted[1]), (first, wanted[0])):
        train.zero_grad()
        loss.backward()
        for name, parameter in train.model.named_parameters():
            close(parameter.grad, of[name], name)
        train.surgery.load_state_dict(fresh)


@pytest.mark.parametrize("cut", ["trunk", "both", "tables"])
def test_the_graph_is_let_go_of(cut):
    import weakref

    train = surgical(cut=cut)
    kept = []
    train.model.tower.trunk.levels[0].experts.register_forward_hook(lambda *of: kept.append(weakref.ref(of[2])))
    loss, _ = train(batch())
    loss.backward()
    train.model.tower.trunk.levels[0].forget_mixes()
    assert kept[0]() is None, "expert outputs live on after backward, while the loss does"
    loss, _ = train(batch())  # and without a backward
    del loss, _
    train.model.tower.trunk.levels[0].forget_mixes()
    assert kept[1]() is None
    gc.collect()


@pytest.mark.parametrize("cut", ["trunk", "both", "tables"])
def test_in_bf16_the_weights_are_those_of_fp32_about(cut):
    def weights(precision):
        of = model()
        of.tower.precision = precision
        train = MTCLTrain(of, gradient_surgery=GradientSurgery("upgrad", cut=cut))
        found = gradients_of(train)
        assert all(torch.isfinite(g).all() for g in found.values())
        return train.surgery.newest_weights

    torch.testing.assert_close(weights("bf16"), weights("fp32"), atol=0.05, rtol=0.05)


def test_statistics_are_moving_averages_and_travel_in_the_state():
    train = surgical(decay=0.5)
    cosines, weights = [], []
    for number in (0, 1):
        plain = Plain(train.model, batch(number))
        g = (lambda j: j @ j.T)(plain.shared_gradients())
        cosines.append((g / g.diagonal().sqrt() / g.diagonal().sqrt().unsqueeze(1))[0, 1].item())
        gradients_of(train, batch(number))
        weights.append(train.surgery.newest_weights[0, 0].item())
    found = train.surgery.statistics()
    part = found.parts[0]
    assert (found.tasks, found.steps, part.name) == (("click", "rare", "seconds"), 2, "trunk")
    assert part.cosine[0][1] == pytest.approx(cosines[0] / 3 + cosines[1] * 2 / 3, abs=1e-6)
    assert part.cosine[1][0] == pytest.approx(part.cosine[0][1])
    assert part.weights[0] == pytest.approx(weights[0] / 3 + weights[1] * 2 / 3)
    assert part.conflicts[0][1] == sum(c < 0 for c in cosines) / 2
    assert part.cosine[2][2] == pytest.approx(1)
    again = surgical(decay=0.5)
    again.load_state_dict(train.state_dict())
    assert again.surgery.statistics() == found
    assert GradientSurgery().training
    copy.deepcopy(train.surgery)


def test_the_gramian_is_accurate_in_every_type_and_length():
    g = torch.Generator().manual_seed(0)
    for length in (1, 5, 1023, 1024, 5000):
        for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-7), (torch.bfloat16, 1e-7)):
            rows = (torch.randn(3, length, generator=g) * torch.tensor([[1.0], [1e-3], [10.0]])).to(dtype)
            exact = rows.double() @ rows.double().T
            norms = exact.diagonal().sqrt()
            assert ((gramian(rows) - exact) / norms / norms.unsqueeze(1)).abs().max() < tolerance


@pytest.mark.parametrize("weighted", [False, True])
def test_the_gramian_of_tables_is_that_of_their_dense_gradients(weighted):
    pooling = PoolingType.SUM if weighted else PoolingType.MEAN
    tables = [
        EmbeddingBagConfig(name="a", num_embeddings=9, embedding_dim=4, feature_names=["f", "g"]),
        EmbeddingBagConfig(name="b", num_embeddings=5, embedding_dim=4, feature_names=["f"], pooling=pooling),
        EmbeddingBagConfig(name="c", num_embeddings=5, embedding_dim=8, feature_names=["h"]),
    ]
    torch.manual_seed(0)
    ebc = EmbeddingBagCollection(tables=tables, is_weighted=weighted)
    lengths = torch.tensor([2, 0, 3, 1, 1, 1, 0, 4, 1, 2, 2, 2])
    features = KeyedJaggedTensor(
        ["h", "f", "g"],
        torch.randint(5, (int(lengths.sum()),)),
        torch.rand(int(lengths.sum())) if weighted else None,
        lengths=lengths,
    )
    pooled = ebc(features)
    dims = dict(zip(pooled.keys(), pooled.length_per_key(), strict=True))
    x = torch.cat([pooled[key] for key in dims], 1)
    given = torch.randn(3, *x.shape)
    jacobian = []
    for g in given:
        of_tables = torch.autograd.grad(x, list(ebc.parameters()), g, retain_graph=True)
        jacobian.append(torch.cat([t.flatten() for t in of_tables]).double())
    jacobian = torch.stack(jacobian)
    found = table_gramian(given, features, table_lookups(ebc, dims))
    torch.testing.assert_close(found, jacobian @ jacobian.T, atol=1e-5, rtol=1e-6)


def test_memory_does_not_grow_with_the_tables():
    """Nothing of a table's size is made: the tables are on the meta device, and of the ids only 64 are met."""

    def allocated(size):
        table = EmbeddingBagConfig(name="t", num_embeddings=size, embedding_dim=16, feature_names=["f"])
        lookups = table_lookups(EmbeddingBagCollection(tables=[table], device=torch.device("meta")), {"f": 16})
        ids = torch.linspace(0, size - 1, 64).long()
        features = KeyedJaggedTensor(["f"], ids, lengths=torch.ones(64, dtype=torch.int64))
        with torch.profiler.profile(profile_memory=True) as profile:
            table_gramian(torch.randn(3, 64, 16), features, lookups)
        return sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())

    small, large = allocated(100), allocated(5_000_000_000)
    assert small > 10_000
    assert large == small


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cut": "trunks"}, "no cut 'trunks' .did you mean 'trunk'"),
        ({"groups": [["user"]]}, "groups of features have weights of their own at 'embeddings' or 'both'"),
        ({"cut": "both", "groups": [["usr"]]}, "groups: no feature 'usr' .did you mean 'user'"),
        ({"cut": "both", "groups": [["user"], ["user"]]}, "grouped feature 'user' is declared twice"),
        ({"min_weight": 2.0}, "clamped around 1"),
        ({"weighting": "upgrade"}, "no gradient surgery 'upgrade' .did you mean 'upgrad'"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MTCLTrain(model(), gradient_surgery=GradientSurgery(**options))


def test_one_task_one_use_and_a_call_too_early_are_refused():
    surgery = GradientSurgery()
    with pytest.raises(ConfigError, match="not part of a model yet"):
        surgery(None)
    MTCLTrain(model(), gradient_surgery=surgery)
    with pytest.raises(ConfigError, match="part of a model already"):
        MTCLTrain(model(), gradient_surgery=surgery)
    ebc = EmbeddingBagCollection(
        tables=[EmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=4, feature_names=["f"])]
    )
    with pytest.raises(ConfigError, match="two tasks at least"):
        MTCLTrain(MTCL(ebc, 0, TRUNKS["mmoe"](), [Task.binary("click")]), gradient_surgery=GradientSurgery())


@pytest.mark.parametrize("trunk", ["mmoe", "ple", "adatt", "home", "stem"])
def test_gradients_that_come_by_their_factors_are_those_that_come_whole(trunk, monkeypatch):
    """Also where an earlier backward pass did not come as far as the cut, and beside a penalty on expert outputs."""
    found = []
    for whole in (False, True):
        if whole:
            monkeypatch.setattr("mtcl_torchrec.modules.mixing.hand_over", lambda *of: None)
        train = surgical(trunk=trunk)
        for penalty in (0.0, 0.5):
            train.zero_grad()
            loss, _ = train(batch())
            level = train.model.tower.trunk.levels[-1]
            torch.autograd.grad(loss, level.gate_weight, retain_graph=True)
            (loss + penalty * level.mixes[0].outputs.square().sum()).backward()
            found.append({"weights": train.surgery.newest_weights.clone()}
                         | {n: p.grad.clone() for n, p in train.model.named_parameters()})  # fmt: skip
    for mine, theirs in zip(found[:2], found[2:], strict=True):
        for name, value in theirs.items():
            close(mine[name], value, name)


class Waits(TorchDispatchMode):
    """Counts the operations after which the host knows a value of a tensor, or how large a result came out."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "unique", "masked_select", "item")

    def __init__(self):
        super().__init__()
        self.met = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.lstrip("_").startswith(tuple(n.lstrip("_") for n in self.NAMES)):
            self.met.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "cut"), [("measure", "trunk"), ("upgrad", "trunk"), ("upgrad", "embeddings")])
def test_the_default_solver_makes_nobody_wait_for_the_device(kind, cut):
    def waits(surgery):
        train = MTCLTrain(model(), gradient_surgery=surgery)
        train(batch())[0].backward()  # what is done once is done
        with Waits() as waits:
            train(batch())[0].backward()
        return sorted(waits.met)

    plain = waits(None)
    assert waits(GradientSurgery(kind, cut=cut)) == plain
    assert len(waits(GradientSurgery("aligned_mtl", cut=cut))) > len(plain)  # which says that it waits
