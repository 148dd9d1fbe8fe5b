"""Downloading published archives, checkpoints and tokenizers, and pinning each file by its SHA-256.

`sources` reads the list of links (`data_sources.yaml`), `required` lists the files that a config needs, `lockfile`
stores the hashes, `download` fetches one file, `archives` unpacks one, and `provide` does all of it for a list of
files.
"""
