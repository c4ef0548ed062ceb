"""Time: phases, steps, evaluation, checkpoints, adapters on disk."""
