"""Flow control of one model in one ingress: the queue, the slots, and the credits for slots."""
