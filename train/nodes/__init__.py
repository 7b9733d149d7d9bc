"""A job's processes on several machines: where this one stands, who is there, Slurm, what each process writes."""
