"""Weight files: finding them in installed packages, reading them without running code in them, and writing tiny ones.

This is the lowest room of the encoders: it knows no network code.
"""
