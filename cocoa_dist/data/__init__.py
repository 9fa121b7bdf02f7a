"""From Arrow shards to packed batches."""
