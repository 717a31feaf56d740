"""Health checks, metrics and the status page."""
