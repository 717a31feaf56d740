"""The nouns of a limit and its arithmetic, in this process; knows no Redis and no HTTP."""
