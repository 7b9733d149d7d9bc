"""What a job would cost and hold, before it is started."""
