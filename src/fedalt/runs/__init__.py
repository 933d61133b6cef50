"""Runs on one machine: settings, folder, checkpoints, membership, comparison, tuning."""
