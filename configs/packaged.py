"""The experiments that ship with the package, found wherever it is installed."""

from pathlib import Path


def packaged_config(name: str) -> Path:
    """The file of the experiment `name`, such as `demo/lite`."""
    return Path(__file__).parent / f"{name}.yaml"
