"""One repository on the Hub and its history."""
