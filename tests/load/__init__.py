"""Load and faults: a real server on loopback, many clients, and the plain engine's outputs beside them."""
