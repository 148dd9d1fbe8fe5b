"""The models of transformers: `vision` and video models, `text` models, and their `loading`.

Importing any of these modules imports transformers, which takes seconds; `networks.hf` does so only to build a model.
"""
