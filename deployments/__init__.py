"""What runs on the cluster: models, engine replicas and the engines' own servers."""
