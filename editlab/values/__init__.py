"""Values v*: the outputs that the edited layer should have at the last tokens of subjects."""
