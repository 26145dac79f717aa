"""Files in, files out: a batch of requests from a file, its results in another, resumed where it was interrupted."""
