"""Shards in a remote store: fetched whole and checked, kept in the node's cache."""
