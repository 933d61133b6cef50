"""Low-rank adapters bound to a frozen transformers model, and plans of how they combine."""
