"""The same federation over Flower; the only package that imports `flwr`, the extra `flower`."""
