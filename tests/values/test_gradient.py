"""UltraEdit's steps against a direct transcription in float64, and its gradients against plain autograd."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from editlab.errors import UserError
from editlab.keys.subject_keys import Site
from editlab.lm.language_model import LanguageModel
from editlab.values import gradient as module
from editlab.values.gradient import RunningMoments, read_gradients, steps_of
from editlab.values.settings import ValueSettings
from tests.tiny import tiny_model, tiny_tokenizer
from tests.values.test_optimize import FACTS

SETTINGS = ValueSettings(source="gradient", matmul="float32")


def test_running_moments_by_hand():
    # Feature 0: 1, 3 | 8 | 4, 4: mean 20 / 5; squares 9 + 1 + 16 + 0 + 0. Feature 1 is constant.
    moments = RunningMoments.empty(2)
    for rows in ([[1.0, 5.0], [3.0, 5.0]], [[8.0, 5.0]], [[4.0, 5.0], [4.0, 5.0]]):
        moments = moments.plus(torch.tensor(rows))
    assert moments.count == 5
    assert moments.mean.tolist() == [4.0, 5.0]
    assert moments.squares.tolist() == pytest.approx([26.0, 0.0], abs=1e-12)
    # (8 - 4) / sqrt(26 / 4); a feature without a deviation is 0.
    assert moments.normalized(torch.tensor([[8.0, 5.0]])).tolist() == [[pytest.approx(4 / 6.5**0.5), 0.0]]


def test_moments_of_batches_are_those_of_all_rows():
    rows = torch.randn(50, 6, dtype=torch.float64) + 100
    moments = RunningMoments.empty(6)
    for some in rows.split([1, 2, 30, 17]):
        moments = moments.plus(some)
    assert torch.allclose(moments.mean, rows.mean(0), rtol=1e-14)
    assert torch.allclose((moments.squares / 49).sqrt(), rows.std(0), rtol=1e-12)


def test_steps_are_those_of_a_transcription():
    keys, gradients = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    features = torch.cat([keys, gradients], 1)
    moments = RunningMoments.empty(9).plus(features[:4]).plus(features[4:])
    found = steps_of(keys[4:], gradients[4:], moments, eta=0.3)
    for i, step in zip(range(4, 9), found, strict=True):  # the statistics are those of both batches
        z = [(features[i, j] - features[:, j].mean()) / (features[:, j].std() + 2.0**-23) for j in range(9)]
        expected = [-0.3 * sum(h * h for h in z[:5]) * g for g in z[5:]]
        assert step.tolist() == pytest.approx([float(e) for e in expected], rel=1e-12)


def plain(lm, fact, site):
    """Key, gradient and output of one fact by autograd over the whole model, in float64."""
    encoding, start = lm.encode_pair(fact.question, fact.target_new)
    last, ids = encoding.token_at(fact.subject_span[1]), torch.tensor([encoding.ids])
    seen = {}

    def read(_module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.requires_grad_().retain_grad()
        seen["output"] = hidden

    layer = lm.anatomy.edit_module(site.layer)
    handles = [
        layer.register_forward_pre_hook(lambda _, args: seen.__setitem__("key", args[0].detach())),
        site.module.register_forward_hook(read),
    ]
    logits = lm.model.double()(input_ids=ids, use_cache=False).logits[0]
    cross_entropy(logits[start - 1 : -1], ids[0, start:]).backward()
    [handle.remove() for handle in handles]
    return seen["key"][0, last], seen["output"].grad[0, last], seen["output"][0, last].detach()


@pytest.mark.parametrize("family", ["llama", "gptj", "gemma2"])  # gptj gives tuples, gemma2's site is the layer
def test_gradients_are_those_of_plain_autograd(family):
    lm = LanguageModel(tiny_model(family), tiny_tokenizer())
    site = Site.of(lm, 1)
    found = read_gradients(lm, FACTS, site, SETTINGS)
    apart = read_gradients(lm, FACTS, site, ValueSettings(source="gradient", matmul="float32", batch_tokens=1))
    for i, fact in enumerate(FACTS):
        for ours, alone, expected in zip(found, apart, plain(lm, fact, site), strict=True):
            assert (ours[i].double() - expected).norm() < 1e-4 * expected.norm(), fact
            assert (alone[i].double() - expected).norm() < 1e-4 * expected.norm(), fact
        lm.model.float()


def test_errors_of_the_gradient(monkeypatch):
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer())
    with pytest.raises(UserError, match="layer 3 at a subject's last token affects no target"):
        read_gradients(lm, FACTS[:2], Site.of(lm, 3), SETTINGS)
    with pytest.raises(UserError, match="one fact so far, which has none: let the first batch"):
        RunningMoments.empty(2).plus(torch.ones(1, 2)).normalized(torch.ones(1, 2))
    for name, value in {"steps": 3, "reference": "original", "anchor_facts": 2, "clamp": 1.0}.items():
        with pytest.raises(UserError, match=f"model.values.{name} has no meaning"):
            ValueSettings(source="gradient", **{name: value})
    assert module.EPSILON == 2.0**-23
