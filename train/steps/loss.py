"""The losses of M heads for each question, before they are averaged.

Shape legend: M heads, B questions, A answers.
"""

from torch import Tensor
from torch.nn import functional

from egopatch.train.data.batch import Options

# Difference of two cosines that counts as one in the contrast of paraphrase and counterfactual.
CONTRAST_TEMPERATURE = 0.1


def cross_entropy(logits: Tensor, answers: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of M heads' logits [M, B, A] for the answers [B], [M, B].

    Equals `functional.cross_entropy`, with fewer operations if labels are smoothed.
    """
    log_shares = logits.log_softmax(dim=-1)
    if not smoothing:  # the shares of options that a question does not have are zero, and their logarithms infinite
        return -log_shares.gather(-1, answers.expand(len(logits), -1)[..., None]).squeeze(-1)
    rest = -smoothing / logits.shape[-1]
    target = logits.new_full(logits.shape[1:], rest).scatter_(1, answers[:, None], rest - (1 - smoothing))
    return (log_shares * target).sum(dim=-1)


def contrast(logits: Tensor, paraphrase: Tensor, counterfactual: Tensor, options: Options | None) -> Tensor:
    """Loss [M, B], small if a question's logits [M, B, A] are closer to its paraphrase's than to its counterfactual's:
    the cross-entropy of choosing the paraphrase by the cosine of the logits.
    """
    near, far = (
        functional.cosine_similarity(_centred(logits, options), _centred(found, options), dim=-1)
        for found in (paraphrase, counterfactual)
    )
    return functional.softplus((far - near) / CONTRAST_TEMPERATURE)


def _centred(logits: Tensor, options: Options | None) -> Tensor:
    """Logits minus their mean over the answers, which no probability depends on.

    Options that a question does not have are zero: their own logits, far below all others, would make any two questions
    alike.
    """
    logits = logits.float()
    if options is None:
        return logits - logits.mean(dim=-1, keepdim=True)
    present = options.index >= 0
    mean = logits.masked_fill(~present, 0).sum(dim=-1, keepdim=True) / present.sum(dim=-1, keepdim=True)
    return (logits - mean).masked_fill(~present, 0)
