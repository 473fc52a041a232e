"""What a run needs before it is submitted: memory, traffic, time, cost, and the ways out where it does not fit."""
