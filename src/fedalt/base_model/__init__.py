"""Reading a base model so that nothing of it is drawn at random or guessed, and telling bases apart."""
