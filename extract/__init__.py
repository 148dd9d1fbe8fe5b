"""Stage one: a frozen video encoder over all clips, its patch tokens into a store."""

if __name__ == "extract":  # the short name, in a checkout
    from egopatch import short_names

    short_names.alias(__name__)
