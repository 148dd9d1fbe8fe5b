"""Operations on whole stores, one module for each command of `egopatch features`.

Each module offers one function with the command's name: `verify`, `repair`, `convert`, `derive`, `compare`, `export`,
and `import_features` in `importing`. `audit` reads a store's description despite damage; `feature_files` reads and
writes the files of other programs; `sources` finds videos that have changed.
"""
