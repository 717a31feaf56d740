"""A differential fuzz of the middleware: random apps,
histories and configurations, judged by the app alone.
"""
