"""The part of the packaging that setup.cfg has no word for: the folder ``configs`` is the package ``editlab.configs``.

So recipes, presets and experiments are in the wheel, and their one copy stays at the top of the repository.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["editlab*", "callbacks*"]), "editlab.configs"],
    package_dir={"editlab.configs": "configs"},
)
