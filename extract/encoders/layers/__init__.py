"""Parts that several networks are built from: the space-time transformer, the two encoder interfaces, compilation.

Nothing here imports a network.
"""
