"""Keys k of subjects, the contexts that they are read in, and second moments C0 of the keys of ordinary text."""
