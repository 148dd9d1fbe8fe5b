"""Operations on whole stores, one module for each command of `python -m features`.

Each module offers one function with the command's name: `verify`, `repair`, `convert`, `derive`.
"""
