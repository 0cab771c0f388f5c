"""Keys drawn at random in the place of those of facts that are not at hand.

A plan for N edits may be made from fewer facts. A further fact's key lies partly among the keys that are known (the
same kinds of subjects) and partly outside of what they span, as each subject has something of its own. Drawn keys have
both parts, in the proportion in which the last key that was read has them::

    k = sqrt(1 - v) K g / sqrt(n) + sqrt(v) a z        g ~ N(0, I),  z ~ N(0, C0)

K g / sqrt(n) has the second moments of the keys K [d_k, n] that were read; ``a`` gives the second part their mean
length. Lengths are measured by C0^-1, as the solve does. The *novelty* v is the mean fraction of a key's squared length
that no combination of the other n - 1 keys gives, ``1 / (G_jj (G^-1)_jj)`` with the Gram matrix ``G = K^T C0^-1 K``.
More drawn keys crowd each other as keys of ordinary tokens do. That is a guess about facts that nobody has seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from editlab.keys.key_sample import KeySample
from editlab.solver.preservation import Preservation


def novelty(whitened: Tensor) -> float:
    """Mean fraction of the squared length of keys, whitened by C0, [r, n], that lies outside the span of the others.

    It is 1 for keys that are orthogonal to each other, and 0 if there are more keys than dimensions.
    """
    gram = whitened.T @ whitened
    # The smallest eigenvalue counts at least as much as rounding, so that keys of one subject have no novelty.
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(1e-10 * float(values[-1]))
    inverse = (vectors.square() / values).sum(1)
    return float((1 / (inverse * gram.diagonal())).clamp(0, 1).mean())


def with_drawn(sample: KeySample, moments: Tensor, count: int, seed: int = 0) -> KeySample:
    """The keys of a sample, followed by drawn ones up to ``count``; context keys are repeated from the first fact on.

    Args:
        sample: keys that were read at one layer, of at least one fact.
        moments: second moments C0 of the layer, [d_k, d_k].
        count: number of facts that the result has; not below those of the sample.
        seed: seed of the draws; with one seed, the parts among known keys are alike at all layers.
    """
    known = sample.keys.shape[1]
    more = count - known
    if more <= 0:
        return sample
    metric = Preservation.from_moments(moments)
    whitened = metric.whiten(sample.keys)
    new = novelty(whitened)
    generator = torch.Generator().manual_seed(seed)
    mixed = sample.keys @ torch.randn(known, more, generator=generator, dtype=torch.float64) / known**0.5
    own = metric.factor @ torch.randn(len(moments), more, generator=generator, dtype=torch.float64)
    length = float(whitened.square().sum(0).mean()) / len(moments)
    drawn = (1 - new) ** 0.5 * mixed + (new * length) ** 0.5 * own
    keys, facts = [sample.context_keys], [sample.context_fact]
    for start in range(known, count, known):
        inside = sample.context_fact < count - start
        keys.append(sample.context_keys[:, inside])
        facts.append(sample.context_fact[inside] + start)
    return KeySample(torch.cat([sample.keys, drawn], 1), torch.cat(keys, 1), torch.cat(facts))
