"""What an operator asks: rights, quotas, and the state of servers."""
