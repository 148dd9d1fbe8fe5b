"""Downloading published archives, checkpoints and tokenizers, and pinning each file by its SHA-256.

`sources` reads the list of links (`data_sources.yaml`), `lockfile` stores the hashes, `download` fetches one file,
`archives` unpacks one, and `provide` does all of it for one config. Other rooms use `provide.required_files` and
`provide.provide`.
"""
