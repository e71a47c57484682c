"""The engine that trains any method."""
