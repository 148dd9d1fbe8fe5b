"""EgoPatch: egocentric video question answering on precomputed patch features.

`egopatch.extract` encodes videos once, `egopatch.features` stores the patch tokens, `egopatch.train` trains heads on
them, `egopatch.configs` checks every experiment's YAML file. In the repository the four are folders at the top, and
this package holds links to them.
"""

from importlib import import_module

from egopatch.environment import require_environment
from egopatch.interrupt import end_on_interrupt

require_environment()
end_on_interrupt()

TYPE_CHECKING = False  # for mypy; typing takes longer to import than everything above

if TYPE_CHECKING:
    from egopatch.configs.command_line import load_config
    from egopatch.extract.datasets import register_dataset
    from egopatch.extract.encoders import register_encoder
    from egopatch.features import create_store, open_store
    from egopatch.train.heads import register_head
    from egopatch.train.report.kept_picture import clip_frames

__version__ = "0.1.0"
__all__ = [
    "clip_frames",
    "create_store",
    "load_config",
    "open_store",
    "register_dataset",
    "register_encoder",
    "register_head",
]

_ROOMS = {
    "clip_frames": "egopatch.train.report.kept_picture",
    "load_config": "egopatch.configs.command_line",
    "register_dataset": "egopatch.extract.datasets",
    "register_encoder": "egopatch.extract.encoders",
    "register_head": "egopatch.train.heads",
}

if not TYPE_CHECKING:  # mypy would accept any name

    def __getattr__(name: str) -> object:
        # torch takes seconds to import, and the command line does not need it before it knows its command.
        if name not in __all__:
            raise AttributeError(f"module 'egopatch' has no attribute {name!r}")
        return getattr(import_module(_ROOMS.get(name, "egopatch.features")), name)
