"""How checks reach Redis: those that share a trip, one script, and whichever connection takes them there."""
