"""Parts that several networks are built from: the space-time transformer, the two encoder interfaces, compilation.

Other rooms use `VideoEncoder` and `VideoSizes` from `video_encoder`, `TextEncoder` and `Tokenizer` from `text_encoder`,
and `SpaceTimeBlock` from `spacetime`. Nothing here imports a network.
"""
