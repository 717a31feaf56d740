"""Counting: by what is remembered, else in Redis, else in this process;
and a request's charges settled.
"""
