"""Question tables, batches of whole clips, and the features they read from disk, memory or the GPU.

`question_table` plans the batches, and `features` reads and builds them, in the form of `batch` and the size of
`batch_size`. `residency` says where features are kept.
"""
