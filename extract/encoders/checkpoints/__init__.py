"""Weight files: finding them in installed packages, reading them without running code in them, and writing tiny ones.

Other rooms use `load_checkpoint`, `Checkpoint` and `CheckpointError` from `checkpoint`, `Package` and `text_folder`
from `package`, and `write_standin` from `standin`. This is the lowest room of the encoders: it knows no network code.
"""
