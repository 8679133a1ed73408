"""Layers that more than one engine uses."""
