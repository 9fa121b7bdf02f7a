"""From other people's files to Arrow shards: readers of formats, one writer, checks, a summary."""
