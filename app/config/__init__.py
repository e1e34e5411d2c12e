"""Every setting that an operator can set, typed, validated and documented."""
