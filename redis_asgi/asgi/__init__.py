"""What is read of an ASGI scope, whatever for, and the base of the package's own mountable apps."""
