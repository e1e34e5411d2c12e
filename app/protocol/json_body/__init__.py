"""JSON of request bodies: parsed if that is fast, otherwise scanned in place. Pure."""
