"""What a person waits for before anything happens: torch is loaded where it is needed, and Ctrl-C is obeyed at once."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import shop
import yaml

import mtcl_torchrec
from mtcl_torchrec.baselines.entries import ABOUT
from mtcl_torchrec.baselines.kinds import BASELINES
from mtcl_torchrec.config.fusion import KINDS
from mtcl_torchrec.fusing.combiners import known_kinds

RUN = """
data: {log: log.parquet, val_fraction: 0.2, test_fraction: 0.2}
schema:
  user: user_id
  item: product_id
  time: time
  features: [{name: user_id, group: user}, {name: product_id, group: item}]
  tasks: [{name: click, kind: binary}]
training: {epochs: 500, batch_size: 64, patience: 500}
fusion: {weights: {click: 1}}
"""
# Runs commands one after the other; then tells, of each, exit status and output, and which libraries were loaded.
SEVERAL = """
import contextlib, io, json, sys
from mtcl_torchrec.cli import main
told = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["mtcl", *arguments]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as error:
            status = error.code or 0
    heavy = [name for name in ("torch", "torchrec", "sklearn") if name in sys.modules]
    told.append([status, out.getvalue(), err.getvalue(), heavy])
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("startup")
    shop.log().to_parquet(folder / "log.parquet", index=False)
    (folder / "run.yaml").write_text(RUN)
    (folder / "misspelt.yaml").write_text(RUN.replace("batch_size", "batchsize"))
    (folder / "gone.yaml").write_text(RUN.replace("log.parquet", "gone.parquet"))
    misspelt = yaml.safe_load(RUN) | {"tuning": {"optimizers.dense.lrr": {"log": [1e-4, 1e-2]}}}
    (folder / "tuning.yaml").write_text(yaml.safe_dump(misspelt))
    wrong = yaml.safe_load(RUN) | {"tuning": {"optimizers.dense.lr": {"lg": [1e-4, 1e-2]}}}
    (folder / "values.yaml").write_text(yaml.safe_dump(wrong))
    return folder


def test_help_a_first_yaml_and_mistakes_are_answered_without_torch(folder):
    asked = {
        ("--help",): (0, "demo", ""),
        ("train", "--help"): (0, "--resume", ""),
        ("baselines", "--help"): (0, "popularity,", ""),
        ("fly",): (2, "", "No such command 'fly'"),
        ("train",): (2, "", "Missing argument"),
        ("init", "log.parquet"): (0, "product_id", ""),
        ("init", "--world", "shop"): (0, "synthetic:", ""),
        ("baselines", "run.yaml", "--list"): (0, "gradient-boosted", ""),
        ("tune", "run.yaml", "--show-space"): (0, "optimizers.dense.lr:", ""),
        ("tune", "tuning.yaml"): (2, "", "no key 'lrr' in optimizers.dense (did you mean 'lr'?)"),
        ("tune", "values.yaml"): (2, "", "(did you mean 'log'?)"),
        ("train", "misspelt.yaml"): (2, "", "unknown key 'training.batchsize' (did you mean 'batch_size'?)"),
        ("train", "none.yaml"): (2, "", "mtcl: no such file: none.yaml"),
        ("train", "gone.yaml"): (2, "", "gone.parquet"),
        ("evaluate", "runs/none", "--data", "log.parquet"): (2, "", "runs/none: no run here"),
        ("recommend", "runs/none", "--user", "u1"): (2, "", "runs/none: no run here, and no such file"),
        ("fuse", "runs/none"): (2, "", "runs/none: no run here"),
        ("export", "runs/none", "--out", "m.mtcl"): (2, "", "runs/none: no run here"),
        ("report", "runs/none"): (2, "", "runs/none: no run here"),
        ("demo", "--text"): (2, "", "--text needs --folder"),
    }
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, json.dumps(list(asked))],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = dict(zip(asked, json.loads(done.stdout), strict=True))
    for command, (status, out, err) in asked.items():
        found = told[command]
        assert found[0] == status, (command, found)
        assert out in found[1], (command, found)
        assert err in found[2], (command, found)
        assert "Traceback" not in found[2]
        assert found[3] == [], command


def test_what_the_command_line_knows_without_loading_it_is_what_there_is():
    assert list(ABOUT) == list(BASELINES)
    assert sorted(KINDS) == sorted(known_kinds())


def test_every_name_of_the_package_is_there_and_comes_when_it_is_asked_for():
    assert sorted(mtcl_torchrec.__all__) == dir(mtcl_torchrec)
    for name in mtcl_torchrec.__all__:
        assert getattr(mtcl_torchrec, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'MTCLE'"):
        _ = mtcl_torchrec.MTCLE
    code = "import mtcl_torchrec, sys; mtcl_torchrec.Task.binary('click'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_what_torch_lacks_is_said_and_what_else_lacks_is_not_blamed_on_it(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so is gone', name='torch')")
    tried = [sys.executable, "-c", "import mtcl_torchrec; mtcl_torchrec.MTCL"]
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(tried, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    assert "torch 2.13 with torchrec 1.8 and FBGEMM 1.8" in done.stderr.splitlines()[-1]
    (tmp_path / "run.yaml").write_text(RUN.replace("log.parquet", "."))
    shop.log().to_parquet(tmp_path / "log.parquet", index=False)
    done = subprocess.run(
        [sys.executable, "-m", "mtcl_torchrec", "train", "run.yaml"],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("mtcl: mtcl_torchrec is a plugin to TorchRec")
    assert done.stderr.endswith("libtorch.so is gone\n")


# ---------------------------------------------------------------------- Ctrl-C


def begun(command, folder):
    """A process that obeys SIGINT, which one that a shell has put into the background ignores."""
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


def stopped(process, group=False):
    (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
    killer = threading.Timer(60, process.kill)
    killer.start()
    out, err = process.communicate()
    killer.cancel()
    return process.returncode, out, err


def test_ctrl_c_while_libraries_are_loaded(folder):
    code = (
        "import sys, time\n"
        "class Loading:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            print('loading', flush=True); time.sleep(60)\n"
        "sys.meta_path.insert(0, Loading())\n"
        "sys.argv = ['mtcl', 'train', 'run.yaml']\n"
        "from mtcl_torchrec.cli import main; main()"
    )
    process = begun([sys.executable, "-c", code], folder)
    assert process.stdout.readline() == "loading\n"
    status, _, said = stopped(process)
    assert (status, said) == (130, "mtcl: stopped; nothing is kept, the same command begins anew\n")


def test_ctrl_c_while_a_run_trains_and_it_goes_on(folder, tmp_path):
    out = tmp_path / "run"
    train = [sys.executable, "-m", "mtcl_torchrec", "train", "run.yaml", "--out", str(out), "--device", "cpu"]
    process = begun(train, folder)
    until = time.monotonic() + 120
    while not list(out.glob("checkpoints/step_*/state.json")) and time.monotonic() < until:
        time.sleep(0.05)
    status, _, said = stopped(process)
    goes_on = f"mtcl train run.yaml --out {out} --resume"
    assert (status, said) == (130, f"mtcl: stopped; the newest checkpoint is kept, this goes on: {goes_on}\n")
    process = begun([*train, "--resume"], folder)
    while "epoch" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    assert int(re.search(r"epoch (\d+)", line)[1]) > 1
    assert stopped(process)[0] == 130


@pytest.mark.full
def test_ctrl_c_stops_all_ranks_and_one_line_says_so(folder, tmp_path):
    out = tmp_path / "run"
    process = begun(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mtcl_torchrec",
         "train", "run.yaml", "--out", str(out), "--device", "cpu"],
        folder,
    )  # fmt: skip
    until = time.monotonic() + 180
    while not list(out.glob("checkpoints/step_*/state.json")) and time.monotonic() < until:
        time.sleep(0.05)
    _, _, said = stopped(process, group=True)
    ours = [line for line in said.splitlines() if line.startswith("mtcl:")]
    assert ours == [
        f"mtcl: stopped; the newest checkpoint is kept, this goes on: mtcl train run.yaml --out {out} --resume"
    ]
    assert "mtcl_torchrec/" not in said  # a traceback of ours
