"""LoRA adjustment: an adapter trained briefly after the closed form."""
