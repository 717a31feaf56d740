"""The way of checks to Redis: shared trips, one script, and the connections that take them there."""
