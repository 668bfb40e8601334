"""Where tables go: what TorchRec's planner may do, on the ranks that are there or on a cluster that is not."""
