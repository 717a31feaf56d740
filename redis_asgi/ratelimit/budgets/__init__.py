"""Costs in tokens: what a request is taken to cost,
what its answer says it did, and what is under way.
"""
