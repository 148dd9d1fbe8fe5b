"""The lock: what every published file hashed to when it was first seen."""

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from egopatch.configs.schema import ConfigError
from egopatch.features.io.files import write_file


@dataclass(frozen=True)
class Locked:
    """What a file was when it was first seen.

    Attributes:
        sha256: of its bytes, in hex.
        size: in bytes.
        origin: the link it came from, or `by hand`.
    """

    sha256: str
    size: int
    origin: str


class Lock:
    """A JSON file of `Locked` by name; every record is on the disk when `record` returns.

    Raises:
        ConfigError: the file is malformed.
    """

    def __init__(self, path: Path):
        self.path = path
        self._entries = self._read()

    def get(self, name: str) -> Locked | None:
        """What is locked for a name."""
        return self._entries.get(name)

    def record(self, name: str, entry: Locked) -> None:
        """Lock a name that is not locked yet; what other processes recorded meanwhile stays."""
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            self._entries = self._read() | {name: entry}
            tree = {key: asdict(self._entries[key]) for key in sorted(self._entries)}
            write_file(self.path, (json.dumps(tree, indent=1) + "\n").encode())
        finally:
            os.close(folder)

    def _read(self) -> dict[str, Locked]:
        try:
            tree = json.loads(self.path.read_text(encoding="utf-8"))
            return {name: Locked(str(e["sha256"]), int(e["size"]), str(e["origin"])) for name, e in tree.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"lock {self.path} cannot be read ({error!r}); restore it from version control, or delete it to lock"
                " the files that are there now"
            ) from None
