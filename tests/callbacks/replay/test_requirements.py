"""Settings of the editor that memory replay cannot work with, told without a model."""

import pytest

from callbacks import MemoryReplay
from callbacks.replay.requirements import require_settings
from editlab.editor import SequentialEditor
from editlab.errors import UserError
from editlab.solver.methods import ROME
from editlab.training.methods import FineTune

SAMPLED = {"memory": "sampled"}


@pytest.mark.parametrize(
    ("settings", "replay", "sentence"),
    [
        ({"restore_between_batches": True}, {}, "has nothing to remember"),
        ({"layers": [1, 2]}, {"cache_keys": True}, r"cache_keys cannot be used with layers \[1, 2\]"),
        ({"layers": [1], "keys": "mean"}, {"cache_keys": True}, "model.keys is mean: set it to bare"),
        ({"method": FineTune()}, {"memory": "consolidated"}, "past keys are part of the metric of the closed form"),
        ({"method": ROME(), "conventions": "published", "layers": [1]}, SAMPLED, "with ROME's published conventions"),
    ],
)
def test_what_is_refused(settings, replay, sentence):
    with pytest.raises(UserError, match=sentence):
        require_settings(SequentialEditor(language_model="none", **settings), MemoryReplay(**replay))


def test_what_is_not():
    require_settings(SequentialEditor(language_model="none"), MemoryReplay(memory="both"))
    alone = SequentialEditor(language_model="none", layers=[1], keys="bare")
    require_settings(alone, MemoryReplay(cache_keys=True))
