"""What `balance.py` compares: its data, its methods, and each of their trainings as a run."""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

TASKS = {
    "kuairand": ("click", "long_view", "like"),
    "kuairand_ids": ("click", "long_view", "like"),
    "agreeing": ("like", "share", "hide"),
    "opposed": ("like", "share", "hide"),
}
SUM, TWIN = "mmoe", "single task"  # the weighted sum of an MMoE, and its twins
HELPED = "mmoe, all tasks"  # the weighted sum, with the data's other tasks as helpers


@dataclass(frozen=True)
class Method:
    """What is compared.

    Args:
        name: shown in the table.
        family: architecture, loss weighting or gradient surgery.
        changes: merged into the run's YAML.
    """

    name: str
    family: str
    changes: dict[str, Any] = field(default_factory=dict)


def _trunk(name: str, /, *, model: dict[str, Any] | None = None, **trunk: Any) -> Method:
    return Method(name, "architecture", {"model": {"trunk": trunk} | (model or {})})


def _weighting(kind: str, **options: Any) -> Method:
    return Method(kind.replace("_", " "), "loss weighting", {"balance": {"weighting": {"kind": kind, **options}}})


def _surgery(kind: str, cut: str = "trunk", **options: Any) -> Method:
    name = kind.replace("_", "-") + ("" if cut == "trunk" else f" ({cut})")
    return Method(name, "gradient surgery", {"balance": {"surgery": {"kind": kind, "cut": cut, **options}}})


METHODS = (  # trunks of about as many parameters as the MMoE
    Method(SUM, "architecture"),
    _trunk("shared bottom", kind="shared_bottom", expert_layers=[512, 64]),
    _trunk("a network for each task", kind="single_task", expert_layers=[168, 64]),
    _trunk("ple", kind="ple", shared_experts=1, task_experts=1, levels=1),
    _trunk("adatt", kind="adatt", shared_experts=1, task_experts=1, levels=1),
    _trunk("home", kind="home", expert_layers=[144, 64]),
    _trunk("stem", kind="stem", shared_experts=1, task_experts=1, model={"cross_layers": 0}),
    Method("mmoe, epnet", "architecture", {"model": {"epnet": {}}}),
    Method("mmoe, epnet, ppnet", "architecture", {"model": {"epnet": {}, "ppnet": {"hidden": 16}}}),
    Method(HELPED, "architecture"),
    _weighting("uncertainty"),
    _weighting("dwa"),
    _weighting("imtl_l"),
    _weighting("famo"),
    _weighting("tchebycheff"),
    _weighting("geometric_mean"),
    _surgery("upgrad"),
    _surgery("upgrad", "embeddings"),
    _surgery("upgrad", "both"),
    _surgery("upgrad", "tables"),
    _surgery("mgda"),
    _surgery("imtl_g"),
    _surgery("pcgrad"),
    _surgery("gradvac"),
    _surgery("cagrad"),
    _surgery("nash_mtl"),
    _surgery("fairgrad"),
    _surgery("aligned_mtl"),
    _surgery("gradnorm"),
    _surgery("db_mtl"),
)
BY_NAME = {method.name: method for method in METHODS}


@dataclass(frozen=True)
class Training:
    """One training: a method, or the twin of a task, with a factor on the dense learning rate and a seed."""

    data: str
    method: str
    rate: float
    seed: int
    only: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from others."""
        return (self.data, self.method, self.only, self.rate, self.seed)


def configured(training: Training, small: bool, folder: Path) -> Any:
    """The run of a training."""
    from mtcl_torchrec.config import parse_run

    if training.data.startswith("kuairand"):
        raw = kuairand_run(small)
        if training.data == "kuairand_ids":
            del raw["statistics"]
            raw["optimizers"]["tables"]["lr_of"] = dict.fromkeys(("user_id", "video_id", "author_id"), 0.01)
    else:
        raw = world_run(training.data == "opposed", small)
    if training.method != HELPED:
        tasks = [task for task in raw["schema"]["tasks"] if task["name"] in TASKS[training.data]]
        raw["schema"]["tasks"] = [task for task in tasks if training.only in (None, task["name"])]
    raw["fusion"] = {"weights": {task["name"]: 1 for task in raw["schema"]["tasks"]}}
    raw["training"] |= {"watch": [], "patience": 0, "seed": training.seed}
    raw["optimizers"]["dense"]["lr"] *= training.rate
    merge(raw, BY_NAME[training.method].changes if training.method != TWIN else {})
    return parse_run(yaml.safe_dump(raw, sort_keys=False), folder=folder)


def merge(raw: dict[str, Any], changes: dict[str, Any]) -> None:
    """Write changes into nested dictionaries.  What names its own `kind` keeps only the widths and dropout it had."""
    for key, value in changes.items():
        if not isinstance(value, dict):
            raw[key] = value
            continue
        if "kind" in value:
            kept = {k: v for k, v in raw.get(key, {}).items() if k in ("expert_layers", "dropout")}
            raw[key] = kept | value
        else:
            merge(raw.setdefault(key, {}), value)


def kuairand_run(small: bool) -> dict[str, Any]:
    """The demo's data and model, with its statistics counted once for all trainings."""
    from mtcl_torchrec.config import parse_run
    from mtcl_torchrec.data import kuairand
    from mtcl_torchrec.data.prepare import prepare_files

    prepared = Path(tempfile.gettempdir()) / f"mtcl-balance-{os.getuid()}"
    if not (prepared / "run.yaml").exists():
        part = Path(tempfile.mkdtemp(dir=prepared.parent))
        kuairand.write(part / "data")
        prepare_files(parse_run(kuairand.example_run(), folder=part), part / "prepared", lambda _: None)
        with contextlib.suppress(OSError):  # another process was faster
            (part / "prepared").rename(prepared)
    raw = yaml.safe_load((prepared / "run.yaml").read_text())
    for split in ("train", "val", "test"):
        raw["data"][split] = str(prepared / f"{split}.parquet")
    for block in raw["statistics"]:
        block["prepared"] = str(prepared / block["prepared"])
    raw["training"]["epochs"] = 1 if small else 3
    return raw


def world_run(opposed: bool, small: bool) -> dict[str, Any]:
    """The synthetic world "social", its tasks of one mind or the third against the first two."""
    from mtcl_torchrec.data.worlds import world_run as ready_run

    size = 10 if small else 1
    text = ready_run(
        "social", rows=200_000 // size, val_rows=50_000 // size, test_rows=100_000 // size, num_users=3000,
        num_items=3000, factors=False, correlation=0.9, conflict=float(opposed),
        rates={"like": 0.25, "share": 0.15, "hide": 0.1},
    )  # fmt: skip
    raw = yaml.safe_load(text)
    raw["training"]["epochs"] = 2
    return raw
