"""Values v*: what the edited layer should output at the last token of a subject."""
