"""Reading a base model so that nothing of it is random or guessed, and telling bases apart."""
