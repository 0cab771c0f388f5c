"""Keys k of subjects, contexts they are read in, and second moments C0 of a text's keys."""
