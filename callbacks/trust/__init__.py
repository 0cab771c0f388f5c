"""Trust scoring: an edit that does harm is scaled down, cut or rolled back."""
