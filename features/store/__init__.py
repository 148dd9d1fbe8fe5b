"""The store as its users see it: create, open, read, write and read ahead.

Public names are re-exported by `features`; `text_substore` is for those who keep clips and question texts together.
"""
