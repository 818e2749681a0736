"""Answers over HTTP, and follows the store meanwhile: `hf-s3t serve`."""
