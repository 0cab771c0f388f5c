"""A recipe for a tiny model and a few facts: quick, and the same in every test but for what the test says."""

import yaml

from tests.facts import FACTS, write_counterfact


def write_recipe(folder, tiny, facts=FACTS, name="tiny", **sections):
    """Writes ``folder``'s facts.json and NAME.yaml over it.

    Args:
        folder: the working directory of the test.
        tiny: folder of a tiny model.
        facts: of facts.json; None where the test gives a file of its own.
        name: of the recipe.
        **sections: ``model``, ``data`` and ``trainer``: what takes the place of the settings here, or comes to them.
    """
    config = {
        "model": {
            "language_model": str(tiny), "layers": [1, 2], "values": {"steps": 2}, "moments": {"tokens": 256},
            "contexts": {"count": 1, "length": 3},
            "evaluation": {"heldout_tokens": 64, "generation": 0, "bystanders": 0},
        },
        "data": {"path": "facts.json", "limit": 4, "batch_size": 2, "keep": "all"},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }  # fmt: skip
    if facts is not None:
        write_counterfact(folder / "facts.json", facts)
    for section, settings in sections.items():
        config[section] |= settings
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
