"""What commands are given: a run for a YAML, a YAML for a run, data for either; pairs of task and number.

What is given in place of what a command takes is told by what stands there, with the command that would do.
"""

from __future__ import annotations

import math
from pathlib import Path

from mtcl_torchrec.config import RunConfig, load_run
from mtcl_torchrec.schema import ConfigError, DataError

RUNS = Path("runs")
_DATA = (".parquet", ".csv", ".tsv")
YAML = (".yaml", ".yml")
_MOST = 12  # runs of a folder that are named


def read_run_yaml(path: Path, command: str) -> RunConfig:
    """The run that a YAML describes.

    Args:
        command: that takes it, such as ``"train"``.

    Raises:
        ConfigError: it is no YAML: with what it is and what to do.
    """
    if path.is_dir():
        inside = path / "run.yaml"
        if not inside.is_file():
            raise ConfigError(f"{path} is a folder, and mtcl {command} takes the YAML of a run{_instead(path)}")
        again = f"mtcl {command} {inside}"
        if command == "train":
            again += f" trains it anew, with --out {path} --resume it goes on with it"
        raise ConfigError(f"{path} is a run, and mtcl {command} takes its YAML: {again}")
    if path.suffix.lower() in _DATA:
        raise ConfigError(f"{path} is data, and mtcl {command} takes the YAML of a run{_instead(path)}")
    return load_run(path)


def check_run(folder: Path, command: str = "evaluate") -> None:
    """See that a run is there, before torch is loaded.

    Args:
        command: that takes it.

    Raises:
        DataError: there is none: with what there is instead and what to do.
    """
    if (folder / "run.yaml").is_file():
        return
    if folder.is_file() and folder.suffix.lower() in YAML:
        raise DataError(_of_yaml(folder, command))
    if folder.is_file() and folder.suffix.lower() in _DATA:
        raise DataError(f"{folder} is data, and mtcl {command} takes the directory of a run{_instead(folder)}")
    if folder.is_dir() and (runs := _runs_in(folder)):
        raise DataError(f"{folder} is a folder of runs; name one of them: {_named(runs)}")
    raise DataError(f"{folder}: no run here (run.yaml is missing)")


def check_model(places: list[Path], command: str) -> None:
    """See that runs, or a file that one was exported to, are there, before torch is loaded.

    Raises:
        DataError: one is not.
    """
    for place in places:
        if not place.exists():
            raise DataError(f"{place}: no run here, and no such file")
        if place.is_dir() or place.suffix.lower() in (*YAML, *_DATA):
            check_run(place, command)


def task_numbers(pairs: list[str], option: str) -> dict[str, float]:
    """task=number pairs, each option one or several with commas between.

    Args:
        option: that they were given by, for the message.

    Raises:
        ConfigError: something else, or a task twice.

    Example:
        >>> task_numbers(["click=1,like=8", "report=-60"], "--value")
        {'click': 1.0, 'like': 8.0, 'report': -60.0}
    """
    numbers: dict[str, float] = {}
    for pair in (p.strip() for text in pairs for p in text.split(",")):
        name, _, text = pair.partition("=")
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not name or not math.isfinite(number):
            raise ConfigError(f"{option} takes task=number, such as like=8, not {pair!r}")
        if name.strip() in numbers:
            raise ConfigError(f"{option}: {name.strip()!r} is given twice")
        numbers[name.strip()] = number
    return numbers


def _of_yaml(path: Path, command: str) -> str:
    from mtcl_torchrec.baselines.beside import run_directory_of

    found = run_directory_of(load_run(path), RUNS)
    if found is not None:
        return f"{path} is a YAML; its run is {found}: mtcl {command} {found}"
    return f"{path} is a YAML, and {RUNS}/ holds no finished run of it as it stands: mtcl train {path} makes one"


def _instead(path: Path) -> str:
    """What to do with a folder, or with a file of data."""
    if path.is_dir() and (runs := _runs_in(path)):
        return f"; the runs in it: {_named(runs)}"
    if path.is_dir() and not any(part.suffix.lower() in _DATA for part in path.iterdir()):
        return ""
    return f": mtcl init {path} > run.yaml writes one for it"


def _runs_in(folder: Path) -> list[Path]:
    """The runs that stand in a folder, the newest first."""
    runs = [path.parent for path in folder.glob("*/run.yaml")]
    return sorted(runs, key=lambda run: (run / "run.yaml").stat().st_mtime, reverse=True)


def _named(runs: list[Path]) -> str:
    more = f" and {len(runs) - _MOST} more" if len(runs) > _MOST else ""
    return ", ".join(map(str, runs[:_MOST])) + more
