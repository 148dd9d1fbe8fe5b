"""Plain values: errors, locations, specs, fingerprints and dtypes, and how tensors become the bytes of a row.

Nothing in this room opens a file. Other rooms may use every module; users import the public names from `features`.
"""
