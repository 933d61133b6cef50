"""A federation over machines: the same methods, with the server's and the clients' state apart."""
