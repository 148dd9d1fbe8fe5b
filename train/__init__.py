"""Stage two: heads trained on cached features, their evaluation, tables and reports."""

if __name__ == "train":  # the short name, in a checkout; first, since importing egopatch silences Ctrl-C
    from egopatch import short_names

    short_names.alias(__name__)

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from egopatch.train.asking.predict import predict

__all__ = ["predict"]

if not TYPE_CHECKING:  # mypy would accept any name

    def __getattr__(name: str) -> object:
        # torch takes seconds to import, and most commands know only later whether they need it.
        if name != "predict":
            raise AttributeError(f"module 'egopatch.train' has no attribute {name!r}")
        return import_module("egopatch.train.asking.predict").predict
