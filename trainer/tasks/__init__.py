"""What a run learns: a network, its loss on a micro-batch, and pictures of what it has learnt."""
