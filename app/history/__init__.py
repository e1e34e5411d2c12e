"""The recent past of one model over all ingresses, as its Model keeps it for the board. Pure."""
