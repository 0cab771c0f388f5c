"""Settings of methods that train; a batch's update in the model and out of it."""

import pytest
import torch

from editlab.errors import UserError
from editlab.lm.language_model import LanguageModel
from editlab.training.methods import FineTune, LoRAOnly
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (FineTune, {"lr": 0.0}, "FineTune.lr is 0.0: it must be above 0"),
        (FineTune, {"epochs": 0}, "FineTune.epochs is 0: it must be at least 1"),
        (FineTune, {"mini_batch": 0}, "FineTune.mini_batch is 0: it must be at least 1"),
        (FineTune, {"stop_loss": -1.0}, "FineTune.stop_loss is -1.0: it must not be negative"),
        (FineTune, {"norm_constraint": 0.0}, "FineTune.norm_constraint is 0.0: it must be above 0"),
        (FineTune, {"matmul": "float16"}, "FineTune.matmul"),
        (LoRAOnly, {"rank": 0}, "LoRAOnly.rank is 0: it must be at least 1"),
        (LoRAOnly, {"alpha": -1.0}, "LoRAOnly.alpha is -1.0: it must be above 0"),
        (LoRAOnly, {"dropout": 1.5}, "LoRAOnly.dropout is 1.5: it must lie between 0 and 1"),
    ],
)
def test_errors_of_settings_out_of_range(method, arguments, message):
    with pytest.raises(UserError, match=message):
        method(**arguments)


def test_methods_that_train_solve_nothing_and_change_weights():
    for method in (FineTune(), LoRAOnly()):
        assert not method.solves
        assert method.changes_weights
        assert method.largest_batch is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])  # gpt2 stores [d_k, d_v]; opt's MLP gets [tokens, d_k]
@pytest.mark.parametrize("method", [FineTune(), LoRAOnly(rank=2)], ids=["FineTune", "LoRAOnly"])
def test_a_trainee_in_the_model_is_its_update_added_to_the_weights(family, method):
    lm = LanguageModel(tiny_model(family).requires_grad_(False), tiny_tokenizer())
    ids = torch.arange(3, 15)[None]
    before, plain = lm.model.state_dict(), lm.run(ids).logits
    with method.trainee(lm, [1, 2], 0) as trainee, torch.no_grad():
        assert torch.equal(lm.run(ids).logits, plain)  # it starts at zero
        torch.manual_seed(0)
        for parameter in trainee.parameters:
            parameter.normal_(std=0.05)
        inside, updates = lm.run(ids).logits, trainee.updates()
    assert not torch.allclose(inside, plain, atol=1e-3)
    assert torch.equal(lm.run(ids).logits, plain)
    assert list(lm.model.state_dict()) == list(before)
    for layer, update in updates.items():
        weight = lm.anatomy.edit_module(layer).weight
        weight.add_(update.T if lm.anatomy.transposed(layer) else update)
    torch.testing.assert_close(lm.run(ids).logits, inside, rtol=1e-4, atol=1e-4)
