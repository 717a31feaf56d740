"""Reading an ASGI scope: paths, client addresses, bodies. And the base of the package's own apps."""
