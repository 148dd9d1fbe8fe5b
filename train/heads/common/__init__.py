"""Parts that several heads share, and the small baselines that consist of little else.

Other rooms use `Sizes` and `QuestionReader` from `question`, `Noise` and `mix` from `noise`, and the baselines
`Majority`, `QuestionOnly` (`blind`), `Pooled` (`pooled`) and `Attention` (`attention`). Nothing here knows psa or the
published heads.
"""
