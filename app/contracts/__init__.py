"""What processes say to each other, as plain values."""
