"""What a run needs on TPUs, found with their compiler before there are any."""
