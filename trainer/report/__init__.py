"""`halfstep report`: what directories hold, gathered, and written as one self-contained page."""
