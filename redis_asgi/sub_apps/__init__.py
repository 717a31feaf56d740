"""The apps to mount: health checks, metrics and a status page."""
