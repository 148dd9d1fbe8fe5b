"""Question tables, batches of whole clips, and the features they read from disk, memory or the GPU.

Other rooms use `QuestionTable` and `plan_batches` (`question_table`), `Batch` (`batch`), `BatchSize` (`batch_size`) and
`Features` (`features`).
"""
