"""Who counts: what is remembered, else Redis, else this process; and what a request has been charged."""
