"""Logs that other trainers wrote, read and diagnosed."""
