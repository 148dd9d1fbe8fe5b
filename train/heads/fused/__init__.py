"""The published heads: the upper halves of EgoVLPv2 and MFAS, in which question and video attend to each other.

Other rooms use `load_head`, which reads one from a checkpoint, and `FusedSystem`, which runs one on training batches.
"""
