"""Processes and places: everything with a main."""
