"""Stage one: runs a frozen video encoder over all clips and writes its patch tokens to a store."""

if __name__ == "extract":  # the short name, in a checkout
    from egopatch import short_names

    short_names.alias(__name__)
