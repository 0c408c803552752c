"""Results as files: CSV, JSON and pictures."""
