"""Runs on SLURM: what is submitted, what each task of a job does, what happens when a job ends, and watching it."""
