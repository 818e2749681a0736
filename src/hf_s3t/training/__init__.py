"""Trains what the store lacks, with the Trainer."""
