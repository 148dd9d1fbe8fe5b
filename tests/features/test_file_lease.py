"""One owner for each shard; the leases of killed processes expire."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from egopatch.features import ShardOwned, Store, create_store, open_store
from egopatch.features.__main__ import main
from egopatch.features.io import file_lease
from egopatch.features.io.file_lease import hold, lease_path
from egopatch.features.io.process import Owner
from egopatch.features.tools.repair import repair
from tests.features.conftest import FINGERPRINT, IDS, SPEC, clip

SPAWN = multiprocessing.get_context("spawn")


def _hold_until_signalled(root: Path, pipe: Connection) -> None:
    with hold(root, 0):
        pipe.send("held")
        pipe.recv()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return create_store(tmp_path / "store", SPEC, FINGERPRINT, IDS)


def test_a_second_process_is_told_which_process_holds_the_shard(store: Store) -> None:
    ours, theirs = SPAWN.Pipe()
    child = SPAWN.Process(target=_hold_until_signalled, args=(store.path, theirs))
    child.start()
    assert ours.recv() == "held"
    with pytest.raises(ShardOwned, match=rf"shard 0 of .* is held by process {child.pid} on "):
        store.write_shard(0, {IDS[0]: clip(0)}, {IDS[0]: "sha256:0"})
    store.write_shard(1, {IDS[4]: clip(4)}, {IDS[4]: "sha256:4"})  # another shard is free
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    store.write_shard(0, {IDS[0]: clip(0)}, {IDS[0]: "sha256:0"})  # the dead owner's lease expired without any cleanup
    assert store.clip_ids == (IDS[0], IDS[4])
    ours.close()
    theirs.close()


def test_a_reused_pid_is_not_the_owner() -> None:
    mine = Owner.this_process()
    assert mine.may_be_alive()
    assert not replace(mine, ticks=mine.ticks - 1).may_be_alive()
    assert not replace(mine, pid=2**22 + 1).may_be_alive()


NAMED = """
import ctypes
from egopatch.features.io.process import Owner

ctypes.CDLL(None).prctl(15, "a実験を走らせる".encode())  # PR_SET_NAME
print(Owner.this_process().may_be_alive())
"""


def test_a_process_name_truncated_mid_character_can_own_a_lease() -> None:
    """The kernel keeps only 15 bytes of a process name, which may cut a UTF-8 character in two."""
    assert subprocess.run([sys.executable, "-c", NAMED], capture_output=True, text=True).stdout == "True\n"


def test_owners_of_another_boot_or_pid_namespace_may_be_alive() -> None:
    mine = Owner.this_process()
    assert replace(mine, boot="another", ticks=mine.ticks - 1).may_be_alive()
    assert replace(mine, namespace=mine.namespace + 1, ticks=mine.ticks - 1).may_be_alive()


@pytest.mark.parametrize("step_s", [-3600, -2, -1, 1, 2, 3600])
def test_a_clock_step_does_not_change_the_owner(store: Store, monkeypatch: pytest.MonkeyPatch, step_s: int) -> None:
    real_time, real_boot = time.time, psutil.boot_time
    mine = Owner.this_process()
    other = open_store(store.path)
    with store.lease(0):
        # A step moves the time of day, and with it the time of the boot that start times in seconds are derived from.
        monkeypatch.setattr(time, "time", lambda: real_time() + step_s)
        monkeypatch.setattr(psutil, "boot_time", lambda: real_boot() + step_s)
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: real_boot() + mine.ticks / 100 + step_s)
        os.utime(lease_path(store.path, 0), (real_time() + step_s, real_time() + step_s))
        assert Owner.this_process() == mine
        assert mine.may_be_alive()
        with pytest.raises(ShardOwned, match=f"process {os.getpid()} "), other.lease(0):
            pass
    with other.lease(0):  # and the lease has been released all the same
        pass
    assert not lease_path(store.path, 0).exists()


def test_a_reboot_frees_leases_on_local_disks_but_not_on_shared_ones(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lease_path(store.path, 0)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(asdict(replace(Owner.this_process(), boot="the boot before"))))
    with store.lease(0):  # no other kernel can have mounted this file system
        pass
    path.write_text(json.dumps(asdict(replace(Owner.this_process(), boot="another", host="node-7", pid=12))))
    monkeypatch.setattr(file_lease, "_is_local", lambda path: False)
    advice = r"held by process 12 on node-7; wait for .*; if its machine is gone, .* `egopatch features unlock"
    with pytest.raises(ShardOwned, match=advice), store.lease(0):
        pass
    with pytest.raises(ShardOwned, match=r"process 12 on node-7 is writing .* `egopatch features unlock"):
        repair(store.path)


def test_unlock_removes_stale_leases_and_refuses_live_ones(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(file_lease, "_is_local", lambda path: False)
    gone = json.dumps(asdict(replace(Owner.this_process(), boot="another", host="node-7", pid=12)))
    with store.lease(1):
        lease_path(store.path, 0).write_text(gone)
        assert main(["unlock", str(store.path)]) == 1
        assert "is held by process" in capsys.readouterr().err
        assert lease_path(store.path, 0).exists()
        assert main(["unlock", str(store.path), "--shard", "0"]) == 0
        assert "removed lease 00000000.json: process 12 on node-7" in capsys.readouterr().out
        assert lease_path(store.path, 1).exists()
    lease_path(store.path, 0).write_text(gone)
    assert main(["unlock", str(store.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"removed": ["00000000.json: process 12 on node-7"]}
    assert main(["unlock", str(store.path)]) == 0
    assert "has no leases to remove" in capsys.readouterr().out


def test_a_host_name_of_any_bytes_stays_in_one_printable_line(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Linux takes any bytes as a host name: `unlock` removed the lease and then ended with a UnicodeEncodeError."""
    odd = replace(Owner.this_process(), host="node\udcff\x1b[31m\n7", pid=12)
    lease_path(store.path, 0).parent.mkdir(exist_ok=True)
    lease_path(store.path, 0).write_text(json.dumps(asdict(odd)))
    assert main(["unlock", str(store.path)]) == 0
    expected = r"removed lease 00000000.json: process 12 on 'node\udcff\x1b[31m\n7'"
    assert capsys.readouterr().out == f"{expected}\n"
    assert str(replace(odd, host="node-7.küche")) == "process 12 on node-7.küche"


def test_unlock_refuses_a_shard_that_does_not_exist(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    shards = len(store.missing_shards())
    for shard in (-1, shards, 99):
        assert main(["unlock", str(store.path), "--shard", str(shard)]) == 2
        refused = f"features unlock: error: --shard is {shard}, but {store.path} has {shards} shards, counted from 0\n"
        assert capsys.readouterr().err == refused
    assert main(["unlock", str(store.path), "--shard", str(shards - 1)]) == 0
    run = store.path.parent / "run"
    run.mkdir()
    assert main(["unlock", str(run), "--shard", "0"]) == 0
    capsys.readouterr()
    empty = create_store(store.path.parent / "empty", SPEC, FINGERPRINT, ())
    assert main(["unlock", str(empty.path), "--shard", "9"]) == 2
    assert capsys.readouterr().err == f"features unlock: error: --shard is 9, but {empty.path} has no shards\n"


HELD_IN_NAMESPACE = """
import os, sys
from pathlib import Path
from egopatch.features.io.file_lease import hold
with hold(Path(sys.argv[1]), 0):
    print(os.getpid(), flush=True)
    sys.stdin.readline()
"""


def test_unlock_skips_a_lease_its_owner_releases_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Owners release their leases without the lock under which others are taken."""
    names, parse = [], file_lease.parse_owner

    def released(content: bytes) -> Owner | None:
        for name in names:
            lease_path(tmp_path, name).unlink(missing_ok=True)
        return parse(content)

    for gone in ([1], [0, 1]):  # before a lease is opened, and before it is removed
        for shard in (0, 1, 2):
            lease_path(tmp_path, shard).parent.mkdir(exist_ok=True)
            lease_path(tmp_path, shard).write_text(json.dumps(asdict(replace(Owner.this_process(), pid=12))))
        names[:] = gone
        monkeypatch.setattr(file_lease, "parse_owner", released)
        removed = file_lease.remove(tmp_path)
        assert [line.partition(":")[0] for line in removed] == [
            f"{shard:08d}.json" for shard in (0, 1, 2) if shard not in gone
        ]


def test_a_lease_held_in_another_pid_namespace_is_respected(store: Store) -> None:
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no PID namespaces")
    with subprocess.Popen(
        [*unshare, sys.executable, "-c", HELD_IN_NAMESPACE, str(store.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        pid = int(child.stdout.readline())  # a small number, which another process has out here
        with pytest.raises(ShardOwned, match=f"held by process {pid} on "), store.lease(0):
            pass
        child.kill()
        child.wait()
    # The kernel ends the namespace and drops the lock a moment after its parent.
    for _ in range(200):
        if file_lease.holder(lease_path(store.path, 0)) is None:
            break
        time.sleep(0.05)
    with store.lease(0):
        pass


def test_a_half_written_lease_is_free(store: Store) -> None:
    with store.lease(2):
        pass
    lease_path(store.path, 2).write_text('{"host": "x"')
    with store.lease(2):
        assert lease_path(store.path, 2).exists()
    assert not lease_path(store.path, 2).exists()


def test_one_process_cannot_lease_a_shard_twice(store: Store) -> None:
    other = open_store(store.path)
    with store.lease(0), pytest.raises(ShardOwned, match=f"process {os.getpid()} "), other.lease(0):
        pass


def test_ctrl_c_releases_the_lease(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt), store.lease(0):
        raise KeyboardInterrupt
    with store.lease(0):
        assert store.missing_shards()[0].shard == 0
