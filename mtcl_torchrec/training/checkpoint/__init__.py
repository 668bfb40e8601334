"""Checkpoints of a run: the whole state of training, on disk, through torch.distributed.checkpoint."""
