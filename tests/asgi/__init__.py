"""Reading a scope: paths, client addresses, bodies; and the base of mountable apps."""
