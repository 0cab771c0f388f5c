"""The settings of a solve: the method, and how its keys, metric and update are treated."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields

from editlab.errors import UserError
from editlab.keys.subject_keys import KEY_MODES, SITES
from editlab.solver.base import EditMethod
from editlab.solver.device import AUTO, require_setting
from editlab.solver.post_steps import PostStep
from editlab.utils.validation import at_least_one, not_negative, one_of

SETTINGS = {
    "key_mode": "keys",
    "context_key_weight": "preserve_prompt_tokens",
    "device": "solver_device",
}
"""Fields of :class:`SolveSettings` -> their names in the section ``model`` of a recipe, where these differ."""


@dataclass(frozen=True)
class SolveSettings:
    """The settings of a solve that do not depend on which layers are edited.

    Raises:
        UserError: A setting is out of range.
    """

    method: EditMethod
    """metric and slack of the closed form, or a method that solves none: the other settings then have no use"""
    key_mode: str = "bare"
    """how keys are read (:func:`~editlab.keys.subject_keys.read_keys`)"""
    context_key_weight: float = 0.0
    """weight with which the keys of the edited prompts' context tokens enter the metric of their batch; 0: they do
    not"""
    passes: int = 1
    """number of times that a batch goes through the layers, each time for the remaining residual"""
    condition_limit: float = 1e10
    """condition number of the Gram matrix above which the slack is raised"""
    device: str = AUTO
    """device on which the closed form is solved: one with float64, or ``auto`` (:func:`choose_device`)"""
    site: str | None = field(default=None, repr=False)
    """output that a target replaces (:meth:`Site.of <editlab.keys.subject_keys.Site.of>`)"""
    bare_denominator: bool = field(default=False, repr=False)
    """whether the update of a fact is scaled to hold at its bare key (:mod:`editlab.solver.bare_denominator`)"""
    post_steps: tuple[PostStep, ...] = ()
    """what is done with each layer's update before it is added, in this order"""
    compensate: bool = True
    """whether what post-steps or a scaling cut off from an update is carried into the next solve"""

    def __post_init__(self) -> None:
        one_of("model", KEY_MODES, keys=self.key_mode)
        if self.site is not None:
            one_of("model", SITES, site=self.site)
        not_negative("model", preserve_prompt_tokens=self.context_key_weight)
        if not self.condition_limit > 1:
            raise UserError(f"model.condition_limit is {self.condition_limit}: a condition number is above 1.")
        at_least_one("model", passes=self.passes)
        require_setting(self.device)
        wrong = next((step for step in self.post_steps if not isinstance(step, PostStep)), None)
        if wrong is not None:
            raise UserError(f"model.post_steps has {wrong!r}: give post-steps, such as RECT().")
        if self.post_steps and self.passes > 1:
            raise UserError(
                f"model.post_steps act on the whole update of a batch, and with model.passes {self.passes} each pass "
                "adds a part of it: set passes to 1, or remove the post-steps."
            )
        for setting in fields(self)[1:]:
            if setting.default is not MISSING and getattr(self, setting.name) != setting.default:
                name = SETTINGS.get(setting.name, setting.name)
                self.method.require_closed_form(f"model.{name}", "it is a setting of the closed form's solve")
