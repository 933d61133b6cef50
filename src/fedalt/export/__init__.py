"""A client's result as folders that PEFT and transformers load."""
