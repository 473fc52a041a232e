"""From rows of a source to shards: filtered, brought to size, shuffled, written."""
