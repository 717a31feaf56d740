"""Programs as users write them, for type checkers only:
mypy (strict) and pyright (strict). None is ever run.
"""
