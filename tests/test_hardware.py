"""What the machine is said to be: revision, versions, memory, peak speed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from lit_llama.hardware import free_memory_gb, peak_flops, peak_memory_gb, run_environment


def test_environment_names_the_revision_of_this_code_and_its_changes(tmp_path: Path) -> None:
    repository = tmp_path / "checkout"
    (repository / "lit_llama").mkdir(parents=True)
    for name in ("hardware.py", "errors.py"):
        shutil.copy(ROOT / "lit_llama" / name, repository / "lit_llama")
    script = (
        "from lit_llama.hardware import run_environment as e, Path; import json;"
        "a = e()['source']; Path('lit_llama/hardware.py').open('a').write('#'); print(json.dumps([a, e()['source']]))"
    )

    def run(*command: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(repository)}
        return subprocess.run(
            command, cwd=repository, env=environment, check=True, capture_output=True, text=True
        ).stdout

    run("git", "init", "-q")
    run("git", "add", ".")
    run("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "a")
    clean, dirty = json.loads(run(sys.executable, "-c", script))
    assert clean["git_revision"] == dirty["git_revision"] == run("git", "rev-parse", "HEAD").strip()
    assert (clean["git_dirty"], dirty["git_dirty"]) == (False, True)
    assert script.split(";")[0] in clean["command"]
    assert run_environment()["versions"]["torch"] == torch.__version__


def test_peak_memory_sees_what_was_allocated() -> None:
    code = (
        "import torch; from lit_llama.hardware import peak_memory_gb as m; d = torch.device('cpu'); a = m(d);"
        "x = torch.ones(50_000_000); del x; print(m(d) - a)"
    )
    grown = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0.18 < grown < 0.3
    assert peak_memory_gb(torch.device("cpu")) > 0.05


def test_measured_peak_is_no_slower_than_a_product_of_ours() -> None:
    import time

    size = 1024
    a = torch.ones(size, size)
    peak = peak_flops(torch.device("cpu"), torch.float32)
    start = time.perf_counter()
    a @ a
    assert peak > 0.3 * 2 * size**3 / (time.perf_counter() - start)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere it is all of the machine's memory")
def test_free_memory_is_what_psutil_finds() -> None:
    psutil = pytest.importorskip("psutil")
    assert free_memory_gb(torch.device("cpu")) == pytest.approx(psutil.virtual_memory().available / 1e9, abs=1)
