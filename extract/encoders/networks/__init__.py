"""The networks, one file each, and `Network`, the description that the registry keeps of each of them.

A network's file reads a checkpoint and builds its video encoder; `text` builds the text encoders with transformers.
Other rooms look networks up through `extract.encoders.find_network`.
"""
