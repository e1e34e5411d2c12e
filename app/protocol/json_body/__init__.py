"""Request bodies as JSON: parsed if that is quick, else scanned in place. Pure."""
