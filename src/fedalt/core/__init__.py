"""Names, trees, seeds, bytes and atomic files; knows nothing of models or methods."""
