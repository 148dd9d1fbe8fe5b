"""Identifies a process by facts that survive corrections of the clock and reused process numbers."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

from egopatch.features.io.fields import Record, get_count, get_field

_PROC = Path("/proc")


@dataclass(frozen=True)
class Owner:
    """A process.

    Attributes:
        host: Name of its machine, for messages; containers and copies of a machine may share it.
        boot: Id of the kernel's boot, which all containers of a machine share; empty where the kernel has none.
        namespace: Number of its PID namespace; a process number means something only inside of it.
        pid: Process number.
        ticks: Its start, in clock ticks since the boot.
    """

    host: str
    boot: str
    namespace: int
    pid: int
    ticks: int

    @classmethod
    def this_process(cls) -> "Owner":
        """The owner that stands for this process."""
        return cls(socket.gethostname(), this_boot(), _namespace(), os.getpid(), start_ticks(os.getpid()) or 0)

    @classmethod
    def from_json(cls, record: Record) -> "Owner":
        """The owner that `dataclasses.asdict` turned into `record`.

        Raises:
            MalformedRecord: A field is missing or has another type.
        """
        return cls(
            get_field(record, "host", str),
            get_field(record, "boot", str),
            get_count(record, "namespace"),
            get_count(record, "pid"),
            get_count(record, "ticks"),
        )

    def __str__(self) -> str:
        host = self.host if self.host.isprintable() else repr(self.host)  # a host name may be any bytes
        return f"process {self.pid} on {host}"

    def may_be_alive(self) -> bool:
        """False only if the process has certainly ended; other machines and PID namespaces cannot be observed."""
        if (self.boot, self.namespace) != (this_boot(), _namespace()):
            return True
        if not self.boot:
            return psutil.pid_exists(self.pid)
        return start_ticks(self.pid) == self.ticks


def this_boot() -> str:
    """Id of this boot of the kernel; empty on systems without one."""
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _namespace() -> int:
    try:
        return (_PROC / "self/ns/pid").stat().st_ino
    except OSError:
        return 0


def start_ticks(pid: int) -> int | None:
    """Start of the process `pid` in clock ticks since the boot; None if it has ended."""
    try:
        # The second field, the name in parentheses, may contain anything, even half a character, so it is cut off.
        state, *fields = (_PROC / str(pid) / "stat").read_text("ascii", "replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])
