"""Heads, which stage two trains on cached patch tokens. Each is a system of the results table.

`psa` is our head, `fused` the upper halves of the published networks, `common` holds the small baselines and the parts
that heads share. `build_head` builds the head that a config names; `load_head` loads a published one; `Head` and
`register_head` bring in heads from outside.
"""

from egopatch.train.heads.common.blind import Majority, QuestionOnly
from egopatch.train.heads.common.choice import Choice, unwrapped
from egopatch.train.heads.common.pooled import Pooled
from egopatch.train.heads.common.question import Sizes
from egopatch.train.heads.fused.fused import load_head
from egopatch.train.heads.psa.psa import PSA
from egopatch.train.heads.registry import (
    HEADS,
    Head,
    build_head,
    can_capture,
    can_stack,
    check_head,
    errors_kept,
    package_versions,
    reads_ratio,
    reads_video,
    register_head,
)

__all__ = [
    "HEADS",
    "PSA",
    "Choice",
    "Head",
    "Majority",
    "Pooled",
    "QuestionOnly",
    "Sizes",
    "build_head",
    "can_capture",
    "can_stack",
    "check_head",
    "errors_kept",
    "load_head",
    "package_versions",
    "reads_ratio",
    "reads_video",
    "register_head",
    "unwrapped",
]
