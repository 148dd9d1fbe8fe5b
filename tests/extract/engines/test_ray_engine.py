"""Stage one on a real Ray cluster of two nodes, on loopback and with token authentication on."""

import json
import os
import secrets
import socket
import subprocess
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from egopatch.configs.command_line import load_config
from egopatch.configs.schema import ConfigError
from egopatch.extract.__main__ import main
from egopatch.extract.engines.ray_engine import _connected, _fit, _gather
from egopatch.features import open_store
from egopatch.features.tools.verify import verify
from tests.extract.job import CLIPS, committed, contents, ledger_lines, options, slowly, start_job, wait_until


@dataclass
class Cluster:
    address: str
    process: "subprocess.Popen[str]"

    def remove_node(self) -> None:
        """As if its machine were gone: the node manager and its workers are killed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        workers = self.workers()
        print("remove", file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "removed\n"
        (orphan,) = set(workers) - set(self.workers())
        orphan.kill()  # it would end by itself, but perhaps after the job

    def workers(self) -> list[psutil.Process]:
        """This cluster's workers that have started to work; other tests may run clusters at the same time."""
        family = {process.pid for process in psutil.Process(self.process.pid).children(recursive=True)}
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if any(part.startswith("ray::_Worker.work") for part in process.info["cmdline"] or ())
            if process.pid in family
        ]

    def suspended(self) -> list[psutil.Process]:
        """Suspend its workers."""
        found = self.workers()
        for worker in found:
            worker.suspend()
        return found

    def resume(self) -> None:
        for worker in self.workers():
            with suppress(psutil.NoSuchProcess):  # the one that was killed
                worker.resume()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.extract.engines.ray_cluster"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stdout is not None
        yield Cluster(process.stdout.readline().strip(), process)
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for one in family:
            if one.is_running():
                one.kill()


def on(cluster: Cluster, root: Path) -> list[str]:
    return slowly(root, "--engine.name", "ray", "--engine.address", cluster.address)


def finish(job: "subprocess.Popen[str]") -> str:
    out, error = job.communicate(timeout=200)
    assert job.returncode == 0, error
    assert "Traceback" not in error
    return out


@pytest.mark.slow
def test_two_nodes_write_the_same_store_as_one_process(cluster: Cluster, single: Path, bare: Path) -> None:
    job = start_job(on(cluster, bare))
    wait_until(lambda: len(cluster.suspended()) == 2)
    cluster.resume()
    out = finish(job)
    assert f"this run encoded {CLIPS} clips" in out
    assert contents(bare / "store") == contents(single)
    assert ledger_lines(bare / "store") == ledger_lines(single)


HELPER = """
from egopatch.extract.encoders import find_network

def halve(checkpoint, options):
    encoder = find_network("egovlpv2").build_video(checkpoint, options)
    for parameter in encoder.parameters():
        parameter.mul_(0.5)
    return encoder
"""
# The last line of output is the exit codes.
SCRIPT = """
import dataclasses, json, sys, types
sys.path.append(__file__.removesuffix("script.py") + "helpers")
from helper import halve
from egopatch import register_dataset, register_encoder
from egopatch.extract.__main__ import main
from egopatch.extract.datasets.registry import LOADERS
from egopatch.extract.encoders import find_network
from egopatch.extract.engines import ray_engine

TIMES = 2.0

def build_video(checkpoint, options):  # defined here: no worker can import it
    encoder = halve(checkpoint, options)
    for parameter in encoder.parameters():
        parameter.mul_(TIMES)
    return encoder

if __name__ == "__main__":
    register_encoder(dataclasses.replace(find_network("egovlpv2"), name="mine", build_video=build_video))
    register_dataset("here", LOADERS["egotaskqa"])
    args = ["run", *sys.argv[1:], "--data.name", "here"]
    codes = [main([*args, "--encoder.arch", "mine"])]
    sys.modules["made_up"] = types.ModuleType("made_up")
    sys.modules["made_up"]._Worker = ray_engine._Worker = type(
        "_Worker", (), {"__module__": "made_up", "work": lambda self, *args: None}
    )
    codes += [main([*args, "--encoder.arch", "mine", "--store.path", __file__ + ".store"])]
    print(json.dumps(codes))
"""


@pytest.mark.slow
def test_network_registered_in_a_script_reaches_the_cluster(
    cluster: Cluster, made: Path, bare: Path, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers" / "helper.py").write_text(HELPER)
    args = options(bare, "--engine.name", "ray", "--engine.address", cluster.address)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), *args],
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [0, 2], done.stdout + done.stderr
    stored, expected = open_store(bare / "store"), open_store(made / "store")
    assert stored.fingerprint.fields["arch"] == "mine"
    assert torch.equal(stored.read(stored.clip_ids).patches, expected.read(stored.clip_ids).patches)
    (line,) = (line for line in done.stderr.splitlines() if "error:" in line)
    assert "cannot start a worker (ModuleNotFoundError: No module named 'made_up'); install egopatch and what" in line


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["worker", "node"])
def test_work_of_a_lost_worker_or_node_is_done_by_the_others(
    lost: str, cluster: Cluster, single: Path, bare: Path
) -> None:
    job = start_job(on(cluster, bare))
    # Both workers have started and are in the middle of their work when one is lost, however fast the other is.
    wait_until(lambda: len(cluster.suspended()) == 2)
    cluster.resume()
    wait_until(lambda: committed(bare / "store") >= 2)
    workers = cluster.suspended()
    assert committed(bare / "store") < CLIPS
    if lost == "worker":
        workers[0].kill()
    else:
        cluster.remove_node()
    cluster.resume()
    assert f"this run encoded {CLIPS} clips" in finish(job)
    assert contents(bare / "store") == contents(single)
    assert verify(bare / "store").ok


@pytest.mark.slow
def test_more_workers_than_cluster_cores_are_refused(cluster: Cluster, bare: Path) -> None:
    job = start_job([*on(cluster, bare), "--engine.workers", "3"])
    _, error = job.communicate(timeout=120)
    assert job.returncode == 2
    assert "engine.workers is 3 but the Ray cluster has 2 CPUs, one for each worker; request at most 2, or add" in error
    assert "Traceback" not in error


def test_worker_count_fits_the_gpus_of_the_cluster() -> None:
    demo = Path("configs/demo/egovlpv2.yaml")
    nodes = [{"CPU": 16.0, "GPU": 2.0}] * 2
    assert _fit(load_config(demo), nodes, shards=100) == (4, {"num_gpus": 1.0, "num_cpus": 1.0})
    assert _fit(load_config(demo), nodes, shards=3)[0] == 3
    with pytest.raises(ConfigError, match=r"engine\.workers is 5 but the Ray cluster has 4 GPUs"):
        _fit(load_config(demo, ["--engine.workers", "5"]), nodes, shards=100)
    on_cpus = load_config(demo, ["--encoder.device", "cpu"])
    assert _fit(on_cpus, nodes, shards=100) == (2, {"num_cpus": 16.0})
    with pytest.raises(ConfigError, match=r"encoder\.device is 'cuda:1' but Ray gives each worker a GPU of its own"):
        _fit(load_config(demo, ["--encoder.device", "cuda:1"]), nodes, shards=100)
    for node in ({"CPU": 8.0}, {"GPU": 8.0}):  # a worker on a GPU takes a core as well
        with pytest.raises(ConfigError, match="no node of the Ray cluster has both a GPU and a core"):
            _fit(load_config(demo, ["--encoder.device", "cuda"]), [node], shards=100)
    assert _fit(load_config(demo), [{"CPU": 1.0, "GPU": 8.0}, *nodes], shards=100)[0] == 5


@pytest.mark.parametrize(
    ("cores", "workers", "expected"),
    [
        ((0, 8, 8), "auto", (2, 8)),  # a head node that runs nothing
        ((4, 16), "auto", (2, 8)),  # both on the larger node
        ((4, 16), "5", (5, 4)),
        ((4, 16), "3", (3, 5)),
    ],
)
def test_every_worker_fits_on_a_single_node(cores: tuple[int, ...], workers: str, expected: tuple[int, int]) -> None:
    """Ray would wait forever for the cores of a worker that no node has free."""
    config = load_config(Path("configs/demo/egovlpv2.yaml"), ["--engine.workers", workers])
    nodes = [{"CPU": float(count)} if count else {"memory": 1e9} for count in cores]
    count, needs = _fit(config, nodes, shards=100)
    assert (count, needs["num_cpus"]) == expected
    assert sum(node // int(needs["num_cpus"]) for node in cores) >= count


def test_a_cluster_without_cores_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine\.workers is auto but the Ray cluster has 0 CPUs"):
        _fit(load_config(Path("configs/demo/egovlpv2.yaml")), [{"memory": 1e9}], shards=100)


def test_an_error_of_a_worker_comes_with_its_traceback() -> None:
    class RayTaskError(Exception):
        cause = RuntimeError("no driver")

    def get(_: str) -> None:
        raise RayTaskError('\x1b[36mray::_Worker.work()\x1b[39m (pid=7)\n  File "mine.py", line 3, in encode')

    exceptions = types.SimpleNamespace(RayActorError=type("RayActorError", (Exception,), {}), RayTaskError=RayTaskError)
    ray = types.SimpleNamespace(exceptions=exceptions, get=get, wait=lambda tasks, timeout: (tasks, []))
    with pytest.raises(RuntimeError, match="no driver") as caught:
        _gather(ray, ["task"])
    shown = "".join(traceback.format_exception(caught.value))
    assert 'ray::_Worker.work() (pid=7)\n  File "mine.py", line 3, in encode\n' in shown
    assert "RayTaskError" not in shown


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (lambda: f"127.0.0.1:{_free_port()}", "but nothing answers there"),
        (lambda: "somewhere", "expected local, or host:port of a running Ray cluster"),
    ],
)
@pytest.mark.slow
def test_invalid_cluster_address_is_reported_in_one_line(
    address: Callable[[], str], message: str, bare: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    assert main(["run", *options(bare, "--engine.name", "ray", "--engine.address", address())]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("extract run: error: engine.address is '")
    assert message in line


def test_a_cluster_that_ray_refuses_is_reported_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise RuntimeError("Version mismatch:\n  the cluster runs Ray 2.1")

    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(init=init))
    message = r"\(Version mismatch: the cluster runs Ray 2.1\); correct what this names, or use engine.name joblib"
    with pytest.raises(ConfigError, match=message), _connected("local"):
        pass


@pytest.mark.slow
def test_missing_ray_package_is_reported_in_one_line(
    bare: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["run", *options(bare, "--engine.name", "ray")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "engine.name is 'ray' but Ray is not installed; pip install" in line
