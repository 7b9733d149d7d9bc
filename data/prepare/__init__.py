"""Documents to tokenized shards on a disk."""
