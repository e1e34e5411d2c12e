"""What operators see of requests: an observer is told of each as it ends."""
