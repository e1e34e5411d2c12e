"""What one engine replica needs on its nodes: launch, further nodes, guard, ports, draining."""
