"""What a run shows of itself: metrics, their trackers, speed."""
