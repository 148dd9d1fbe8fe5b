"""Parts that several heads share, and the small baselines that consist of little else.

The baselines are `Majority` and `QuestionOnly` (`blind`), `LongestOption` (`choice`), `Pooled` (`pooled`) and
`Attention` (`attention`). Nothing here knows psa or the published heads.
"""
