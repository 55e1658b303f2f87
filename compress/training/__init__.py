"""Training, plain and by distillation: the loop, schedule, optimiser, EMA, state on disk, and progress for people."""
