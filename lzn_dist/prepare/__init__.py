"""Writing data sets as WebDataset shards with a manifest."""
