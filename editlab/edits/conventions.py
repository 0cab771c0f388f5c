"""Conventions in which editlab differs from the methods' published codes, and the settings that follow either.

Given the same values, keys and second moments, editlab's closed form and the published codes compute the same update.
Three choices around it differ, which the papers leave open or define otherwise than their codes:

- ``values.kl_at``: after which token of "{subject} is a" the KL term of the values compares predictions;
- ``keys``: how the keys of one fact behind several contexts become one key;
- ``site``: whether a value is a state of the residual stream or an output of the MLP.

ROME's code has a fourth: it divides by the key of the bare prompt, ``(C^-1 k)^T k_bare`` with ``k`` the mean key, where
equation 2 of the paper (Meng et al. 2022, arXiv:2202.05262) has one key. Gupta et al. 2024 (arXiv:2403.07175) trace
the collapse of long sequences of edits to this; their r-ROME uses one key.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from editlab.errors import UserError
from editlab.keys.subject_keys import MLP
from editlab.solver.methods import EMMET, MEMIT, ROME, AlphaEdit, Method
from editlab.utils.validation import one_of
from editlab.values.loss import PROMPT, SUBJECT

NAMES = (OWN, PUBLISHED) = ("own", "published")
"""Values of the setting ``model.conventions``."""


@dataclass(frozen=True)
class Conventions:
    """The conventions of one run."""

    kl_at: str = PROMPT
    """token of the essence prompt after which the KL term compares predictions: ``prompt`` or ``subject``"""
    keys: str = "bare"
    """how keys are averaged (:func:`~editlab.keys.subject_keys.read_keys`)"""
    site: str | None = None
    """``stream``, ``mlp``, or None: the stream, or the MLP's output in models with a norm after it"""
    bare_denominator: bool = False
    """whether an update is scaled to hold exactly at the key of the bare prompt, as in ROME's code"""

    @classmethod
    def of(
        cls, name: str, method: Method, keys: str | None = None, site: str | None = None, kl_at: str | None = None
    ) -> Conventions:
        """The conventions of this name for a method, changed by each further setting that is not None.

        Raises:
            UserError: There are no conventions of this name, or none are published for the method.
        """
        one_of("model", NAMES, conventions=name)
        if name == PUBLISHED and type(method) not in OF_CODES:
            known = ", ".join(kind.__name__ for kind in OF_CODES)
            raise UserError(
                f"model.conventions is published, and those of {type(method).__name__} are not known here (only of "
                f"{known}): set model.keys, model.site and model.values.kl_at instead."
            )
        base = OF_CODES[type(method)] if name == PUBLISHED else cls()
        given: dict[str, Any] = {"keys": keys, "site": site, "kl_at": kl_at}
        return replace(base, **{setting: value for setting, value in given.items() if value is not None})


_OF_MEMIT = Conventions(kl_at=SUBJECT, keys="templates")

OF_CODES: dict[type[Method], Conventions] = {
    ROME: Conventions(kl_at=SUBJECT, keys="mean", site=MLP, bare_denominator=True),
    MEMIT: _OF_MEMIT,
    EMMET: _OF_MEMIT,
    AlphaEdit: _OF_MEMIT,
}
"""Method -> the conventions of its published code.

Read in the repositories of ROME, MEMIT, unified-model-editing (EMMET) and AlphaEdit. MEMIT's are shared by the two that
follow it.
"""
