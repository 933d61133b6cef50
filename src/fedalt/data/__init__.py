"""Client data: reading and checking files, prompts and masking, splits, and the built-in suite."""
