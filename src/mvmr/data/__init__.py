"""Images: sources, stores, loading and views."""
