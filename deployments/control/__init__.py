"""What a Model tracks of its pools: feasibility of placement, pool state, wakeups of ingresses."""
