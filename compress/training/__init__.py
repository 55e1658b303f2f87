"""What training and distillation share: schedule, optimiser, EMA, state on disk, the loop, and what a person sees."""
