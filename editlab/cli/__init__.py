"""The ``editlab`` command: its verbs, recipes and error messages."""
