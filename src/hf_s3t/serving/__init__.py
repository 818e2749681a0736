"""Answers from memory, by members that forget in place."""
