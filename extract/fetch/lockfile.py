"""The lock file: the SHA-256 of every published file, as it was when it was first seen."""

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from egopatch.configs.schema import ConfigError
from egopatch.features.io.files import lock_file, write_file


@dataclass(frozen=True)
class LockEntry:
    """A file as it was when it was first seen.

    Attributes:
        sha256: SHA-256 of the file, in hex.
        size: Size in bytes.
        origin: Link that the file came from, or `by hand`.
    """

    sha256: str
    size: int
    origin: str


class Lockfile:
    """A JSON file of `LockEntry` by name; every entry is on disk when `record` returns.

    Raises:
        ConfigError: The file is malformed.
    """

    def __init__(self, path: Path):
        self.path = path
        self._entries = self._read()

    def get(self, name: str) -> LockEntry | None:
        """The entry of a name; None if it has none yet."""
        return self._entries.get(name)

    def record(self, name: str, entry: LockEntry) -> None:
        """Add the entry of a name; entries that other processes have added meanwhile stay."""
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            lock_file(folder, fcntl.LOCK_EX, self.path.parent)
            self._entries = self._read() | {name: entry}
            tree = {key: asdict(self._entries[key]) for key in sorted(self._entries)}
            write_file(self.path, (json.dumps(tree, indent=1) + "\n").encode())
        finally:
            os.close(folder)

    def _read(self) -> dict[str, LockEntry]:
        try:
            tree = json.loads(self.path.read_text(encoding="utf-8"))
            return {name: LockEntry(str(e["sha256"]), int(e["size"]), str(e["origin"])) for name, e in tree.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"lock file {self.path} cannot be read ({error!r}); restore it from version control, or delete it to"
                " lock the files that are present now"
            ) from None
