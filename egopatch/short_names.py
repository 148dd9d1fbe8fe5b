"""Short names in a checkout: `features` for `egopatch.features`, and likewise `extract`, `train` and `configs`.

In the root of the repository Python finds the four folders by their short names too. Without this module it would load
every file a second time, and `features.StoreError` would be another class than `egopatch.features.StoreError`.
An installed package has no short names, and nothing imports this module.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

NAMES = ("configs", "extract", "features", "train")


class _Alias(MetaPathFinder, Loader):
    """Imports `features.x` by importing `egopatch.features.x`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        top, _, inner = fullname.partition(".")
        # `python -m extract` needs the source of `__main__`, which Python then finds in the folder itself.
        if top not in NAMES or not inner or inner == "__main__":
            return None
        return spec_from_loader(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(f"egopatch.{spec.name}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just given the module the alias's spec; this restores its own.
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def alias(name: str) -> None:
    """Make the short `name`, and every name below it, refer to the modules of `egopatch`."""
    if not any(isinstance(finder, _Alias) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Alias())
    sys.modules[name] = import_module(f"egopatch.{name}")
