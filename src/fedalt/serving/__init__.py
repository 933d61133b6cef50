"""Answers for many clients at once, over HTTP: one base model, each request with its adapters."""
