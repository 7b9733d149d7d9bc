"""Tokenized corpora: making them (`prepare`), reading (`corpus`), ordering and packing them (`stream`)."""
