"""Stage two: heads trained on cached features, their evaluation, tables and reports."""

if __name__ == "train":  # the short name, in a checkout
    from egopatch import short_names

    short_names.alias(__name__)
