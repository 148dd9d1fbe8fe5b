import errno
import io
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

import pytest

from egopatch.configs.command_line import ConfigParser
from egopatch.features import AbsentClip, create_store
from egopatch.features.__main__ import main
from egopatch.features.common import disk, progress
from egopatch.features.common.child_errors import ChildError, sendable
from egopatch.features.common.command_line import describe_failure, local_path
from egopatch.features.common.os_errors import gpu_shortage, with_remedy
from egopatch.features.common.progress import BYTES, ProgressDisplay
from egopatch.features.common.signals import signal_handlers
from egopatch.features.common.units import counted, format_bytes
from tests.features.conftest import FINGERPRINT, IDS, SPEC
from tests.features.faults import Picky


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1.0 kB"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_951, "1.0 MB"),
        (4_816_896, "4.8 MB"),
        (24e12, "24.0 TB"),
    ],
)
def test_format_bytes_prints_one_to_three_digits_before_the_point(nbytes: float, text: str) -> None:
    assert format_bytes(nbytes) == text


def test_counted_uses_the_singular_for_exactly_one() -> None:
    assert [counted(n, "clip") for n in (0, 1, 2)] == ["0 clips", "1 clip", "2 clips"]
    assert [counted(n, "is", "are") for n in (0, 1, 2)] == ["0 are", "1 is", "2 are"]


def test_free_space_of_a_missing_path_is_that_of_its_nearest_parent(tmp_path: Path) -> None:
    assert disk.nearest_existing(tmp_path / "a" / "b") == tmp_path
    status = os.statvfs(tmp_path)
    assert disk.free_bytes(tmp_path / "a" / "b") == pytest.approx(status.f_bavail * status.f_frsize, rel=0.05)


def test_local_path_accepts_a_path_with_a_colon() -> None:
    parser = ConfigParser()
    parser.add_argument("--out", type=local_path)
    assert parser.parse_args(["--out", "a:b/c"]).out == Path("a:b/c")


def test_signal_handlers_are_restored_after_an_error() -> None:
    former, received = signal.getsignal(signal.SIGUSR1), []

    def interrupted() -> None:
        with signal_handlers([signal.SIGUSR1], lambda number, _: received.append(number)):
            signal.raise_signal(signal.SIGUSR1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert received == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGUSR1) is former


PARENT = """
import multiprocessing, subprocess, sys, time
from egopatch.features.common.parent import exit_with_parent

def child(ready):
    exit_with_parent()
    ready.send(None)
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs,))
    process.start()
    ours.recv()
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_child_exits_when_its_parent_is_killed(tmp_path: Path, start: str) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, script, start], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        # The pipe ends when the child, which holds it as well, is gone.
        assert parent.stdout.read() == ""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def test_a_log_file_gets_a_line_every_ten_seconds_and_one_at_the_end(clock: SimpleNamespace) -> None:
    out = io.StringIO()
    with ProgressDisplay("encode", 8, "clips", out=out) as display:
        clock.seconds += 9
        display.advance(2, nbytes=3_000_000)
        assert out.getvalue() == ""
        clock.seconds += 1
        display.advance(2, nbytes=3_000_000)
        clock.seconds += 10
        display.advance(4)
    assert out.getvalue().splitlines() == [
        "encode: 4/8 clips, 0.4 clips/s, 6.0 MB, about 10 s left",
        "encode: 8/8 clips, 0.4 clips/s, 6.0 MB, 20 s",
    ]


def test_a_notebook_gets_one_line_updated_in_place(clock: SimpleNamespace) -> None:
    out = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    with ProgressDisplay("encode", 8, "clips", out=out) as display:
        clock.seconds += 1
        display.update(2, detail="a long detail")
        clock.seconds += 1
        display.update(8, detail="done")
    assert out.getvalue() == (
        "\rencode: 2/8 clips, a long detail, about 3 s left\rencode: 8/8 clips, done, 2 s                    \n"
    )
    with ProgressDisplay("train", 1, "steps", out=out, summary=False) as display:
        clock.seconds += 1
        display.advance(1)
    assert out.getvalue().endswith("\rtrain: 1/1 steps, 1.0 steps/s, 1 s\n")


def test_progress_speed_excludes_work_done_by_earlier_runs(clock: SimpleNamespace) -> None:
    display = ProgressDisplay("train", 100, "steps", done=50)
    clock.seconds += 10
    display.update(60, detail="epoch 2/4")
    assert display.line() == "train: 60/100 steps, epoch 2/4, about 40 s left"


def test_progress_shows_byte_sizes_and_accepts_a_total_later(clock: SimpleNamespace) -> None:
    display = ProgressDisplay("fetch a.zip", None, BYTES)
    clock.seconds += 2
    display.update(3_000_000)
    assert display.line() == "fetch a.zip: 3.0 MB, 1.5 MB/s, 2 s"
    display.update(3_000_000, total=9_000_000)
    assert display.line() == "fetch a.zip: 3.0 MB of 9.0 MB, 1.5 MB/s, about 4 s left"


def test_a_silent_display_and_a_failed_task_print_nothing(clock: SimpleNamespace) -> None:
    out = io.StringIO()
    with ProgressDisplay("train", 1, "steps", out=out, silent=True) as display:
        clock.seconds += 60
        display.advance(1)
    with pytest.raises(ZeroDivisionError), ProgressDisplay("train", 1, "steps", out=out):
        raise ZeroDivisionError
    assert out.getvalue() == ""


_EITHER = " (no GPU memory is free, or an earlier kernel failed, which CUDA_LAUNCH_BLOCKING=1 would show)"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error (run with NCCL_DEBUG=INFO for details)\n"
            "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
            "Cuda failure 2 'out of memory'",
            "Cuda failure 2 'out of memory'",
        ),
        (
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            f"CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`{_EITHER}",
        ),
        (
            "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
            f"cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED{_EITHER}",
        ),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED", None),
        ("CUDA error: device-side assert triggered\nSearch for `cudaErrorAssert' in ...", None),
    ],
)
def test_the_gpu_libraries_lack_of_memory_is_recognised(text: str, said: str | None) -> None:
    """cuBLAS gives its status also after a failed assertion in a kernel, so the text names both causes."""
    assert gpu_shortage(RuntimeError(text)) == said


def test_os_errors_come_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/scratch/x")
    assert with_remedy(full) == (
        "/scratch/x: No space left on device; free some space there and run the same command again"
    )
    assert with_remedy(OSError(errno.EROFS, os.strerror(errno.EROFS), "/runs")) == (
        "/runs: Read-only file system; mount its file system for writing, or choose another path"
    )
    # It may be about reading, which another mount would not allow.
    assert with_remedy(PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/runs")) == (
        "/runs: Permission denied; give this user permission, or choose another path"
    )
    assert with_remedy(NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), "a/b")) == (
        "a/b: Not a directory; a part of this path is a file, not a folder: choose another path, or move the file away"
    )
    assert with_remedy(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "a")) == (
        "a: No such file or directory; check the path"
    )
    assert with_remedy(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))).startswith(
        "a file or standard output: No space"
    )
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", None)
        patch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
        with pytest.raises(FileNotFoundError) as unusable:
            tempfile.gettempdir()
    assert with_remedy(unusable.value) == (
        "No usable temporary directory found in ['/nowhere']; set TMPDIR to a folder that can be written"
    )
    assert with_remedy(ValueError("no")) == "no"
    assert with_remedy(OSError("no route")) == "no route"


class _Open(ValueError):
    """It holds a lock, which cannot be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


def test_an_unpicklable_error_is_sent_as_text() -> None:
    for error in (ValueError("no"), AbsentClip(["a"], "here"), FileNotFoundError(2, "gone", "x"), KeyboardInterrupt()):
        assert sendable(error) is error
    for error in (Picky(3, "the disk"), _Open("error 3: the disk")):
        sent = sendable(error)
        assert isinstance(sent, ChildError)
        assert str(sent) == f"{type(error).__name__}: error 3: the disk"


def _full_disk() -> TextIO:
    return Path("/dev/full").open("w")


def _no_reader() -> TextIO:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.parametrize(
    ("output", "code", "said"),
    [
        (_full_disk, 1, "features info: failed: standard output: No space left on device; free some space"),
        (_no_reader, 0, ""),
    ],
)
def test_unwritable_stdout_prints_at_most_one_error_line(
    output: Callable[[], TextIO], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    create_store(tmp_path / "store", SPEC, FINGERPRINT, IDS)
    with monkeypatch.context() as patched, output() as stdout:
        patched.setattr(sys, "stdout", stdout)
        assert main(["info", str(tmp_path / "store")]) == code  # the block flushes once more, into nothing
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith(said) for line in lines] == [True] * bool(said)


def test_a_closed_standard_stream_is_replaced_by_the_null_device(tmp_path: Path) -> None:
    program = (
        "import os, sys, egopatch.features.common.command_line as line\n"
        "def command():\n"
        "    assert os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT) > 2\n"
        "    os.write(1, b'lost'), os.write(2, b'lost'), sys.stdout.isatty()\n"
        "sys.exit(line.run_command('x', command))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "file")]
    for closed in (">&-", "2>&-", "<&- >&- 2>&-"):
        assert subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *command]).returncode == 0
        assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize(
    "command", ["egopatch --help", "egopatch --version", "extract --help", "train fit --help", "features info --help"]
)
def test_help_into_a_closed_pipe_exits_silently(command: str) -> None:
    with _no_reader() as stdout:
        done = subprocess.run(
            [sys.executable, "-m", *command.split()], stdout=stdout, stderr=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("command", "option"),
    [("egopatch --json ask x", "--json"), ("extract --config C status", "--config"), ("train -h2", "-h2"),
     ("features --json info x", "--json")],
)  # fmt: skip
def test_an_option_before_the_command_is_refused_as_one(
    command: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    program, *args = command.split()
    module = "egopatch" if program == "egopatch" else f"egopatch.{program}"
    assert import_module(f"{module}.__main__").main(args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{program}: error: option {option} comes before the command; put one of ")
    assert line.endswith(" first, and its options after it")


def test_a_broken_pipe_other_than_stdout_is_a_failure() -> None:
    assert describe_failure(BrokenPipeError(errno.EPIPE, "Broken pipe")) == "[Errno 32] Broken pipe"
