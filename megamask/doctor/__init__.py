"""What a run needs and how long it takes, before it starts: arithmetic and checks, without a GPU."""
