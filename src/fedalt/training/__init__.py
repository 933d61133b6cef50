"""Local training: batches, the loss on answers only, and the one training loop."""
