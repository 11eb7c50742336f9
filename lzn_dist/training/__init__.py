"""What a run consists of: its state and steps, batches, checkpoints, folder, tracking, signals."""
