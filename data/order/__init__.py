"""Which sample comes when: counts, packing, shuffle, mixture, batches."""
