"""Methods that edit by training: fine-tuning of the edited weights, and a low-rank adapter on them."""
