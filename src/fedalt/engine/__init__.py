"""Engines: what runs a method over clients, and the schedule of a run."""
