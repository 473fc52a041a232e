"""The command line of `halfstep shards`."""
