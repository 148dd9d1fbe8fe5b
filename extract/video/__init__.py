"""Video files: finding and decoding the frames of a clip, and preparing them for a network.

`opening` opens a file, `indexing` lists its frames, and `container` decodes selected ones. `frames` chooses a clip's
frames, and `transforms` says how they are resized and normalised. A frame is turned upright (`orientation`) and becomes
RGB, or stays as it was decoded (`planes`). `nvdec` decodes on a GPU, `decord_frames` compares decord with PyAV.
"""
