"""Experiments: one YAML file each, and the typed schema that every file is checked against."""

if __name__ == "configs":  # the short name, in a checkout
    from egopatch import short_names

    short_names.alias(__name__)
