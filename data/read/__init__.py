"""Units of documents from any source, with what can fail on the way."""
