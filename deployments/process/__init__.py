"""Engine processes: started, watched, logged, and ended to the last descendant."""
