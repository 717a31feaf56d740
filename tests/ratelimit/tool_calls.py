"""Calls of tools, to be refused."""

CALL = {"jsonrpc": "2.0", "id": "call-1", "method": "tools/call", "params": {"name": "search"}}
