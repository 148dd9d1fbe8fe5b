"""Experiments: one YAML file each, and the typed schema that every file is checked against."""

from egopatch.configs.command_line import load_config
from egopatch.configs.schema import Config

__all__ = ["Config", "load_config"]

if __name__ == "configs":  # the short name, in a checkout
    from egopatch import short_names

    short_names.alias(__name__)
