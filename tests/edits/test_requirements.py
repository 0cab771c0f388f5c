"""What a method or a post-step cannot work with is refused with the reason and the fix."""

import pytest
import torch

from callbacks import ForgettingCurve, LoRAAdjust, MemoryReplay
from editlab.edits.batch import SolveSettings, _require_one_constraint
from editlab.edits.requirements import require_batch_size, require_compatible
from editlab.errors import UserError
from editlab.solver.constraints import Constraints
from editlab.solver.methods import MEMIT, ROME, BetaEdit
from editlab.solver.post_steps import RECT


@pytest.mark.parametrize(
    ("settings", "independent", "callbacks", "message"),
    [
        ({"method": BetaEdit()}, False, [], "BetaEdit computes its projector from past keys: add the callback"),
        ({"method": BetaEdit()}, False, [MemoryReplay()], "memory: consolidated"),
        ({"method": MEMIT(), "post_steps": (RECT(),)}, True, [], "set compensate to false"),
        ({"method": MEMIT(), "post_steps": (RECT(),)}, False, [LoRAAdjust()], "LoRAAdjust changes weights after"),
    ],
)
def test_errors_of_what_cannot_work_together(settings, independent, callbacks, message):
    with pytest.raises(UserError, match=message):
        require_compatible(SolveSettings(**settings), independent, callbacks)


def test_a_batch_larger_than_the_method_takes():
    with pytest.raises(UserError, match=r"^ROME edits 1 fact a step: set data\.batch_size to 1\.$"):
        require_batch_size(ROME(), 2)
    require_batch_size(ROME(), 1)
    require_batch_size(MEMIT(), 1000)


def test_what_can_work_together():
    require_compatible(SolveSettings(BetaEdit()), False, [MemoryReplay(memory="both"), LoRAAdjust()])
    require_compatible(SolveSettings(MEMIT(), post_steps=(RECT(),), compensate=False), True, [ForgettingCurve()])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"post_steps": ("RECT",)}, r"model.post_steps has 'RECT': give post-steps, such as RECT\(\)"),
        ({"post_steps": (RECT(),), "passes": 2}, "with model.passes 2 each pass adds a part of it: set passes to 1"),
    ],
)
def test_errors_of_settings(settings, message):
    with pytest.raises(UserError, match=message):
        SolveSettings(MEMIT(), **settings)


def test_error_of_something_carried_into_romes_published_solve():
    one = Constraints(torch.ones(3, 1), torch.ones(2, 1), torch.zeros(1))
    with pytest.raises(UserError, match=r"nothing can be carried into a solve: set model\.compensate to false"):
        _require_one_constraint(one, torch.ones(2, 3))
