"""Writes everything that an upload of a trained head and its store needs: the files, and cards that hubs read.

`origins` says where weights and data come from and under which terms, `cards` writes the texts, `folders` the folders.
"""
