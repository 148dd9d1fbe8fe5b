"""The published heads: the upper halves of EgoVLPv2 and MFAS, in which question and video attend to each other.

`fused` reads one from a checkpoint and runs it on training batches; `layers` has the blocks.
"""
