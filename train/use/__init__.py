"""What a trained run is used for: held-out loss, acceptance of drafts, text."""
