"""Experiments: one YAML file each, and the typed schema that every file is checked against."""

from configs.schema import Config, load_config

__all__ = ["Config", "load_config"]
