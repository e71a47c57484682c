"""Encoders and their weight files."""
