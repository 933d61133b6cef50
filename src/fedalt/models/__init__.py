"""Base models and their tokenizers: from a folder, the hub, a GGUF file or the package."""
